"""Code that means harm, in the real sandbox where there is one, and refusals where there is none."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppojax.envs import PythonTool, Task, isolation
from ppojax.envs.isolation import Limits, Result, check_sandbox, run_python
from ppojax.envs.python_tool import observation
from ppojax.envs.rewards import Rewards
from ppojax.envs.rewards.rules import Numeric
from ppojax.errors import ConfigError

LIMITS = Limits(seconds=5.0, memory_mb=256, processes=8, file_mb=1, output_chars=400)


def missing() -> str:
    try:
        check_sandbox()
    except ConfigError as error:
        return str(error)
    return ""


sandboxed = pytest.mark.skipif(bool(missing()), reason=f"no sandbox was tried: {missing()}")


def run(code: str, **limits: float) -> Result:
    return run_python(code, Limits(**{**vars(LIMITS), **limits}))


@sandboxed
def test_output_errors_and_the_last_value() -> None:
    assert run("import math\nprint('a')\nmath.factorial(5)") == Result("a\n120\n", 0)
    failed = run("def f():\n    return 1 / 0\nprint('before')\nf()")
    assert failed.code == 1
    assert failed.output.splitlines() == [
        "before",
        "Traceback (most recent call last):",
        '  File "code.py", line 4, in <module>',
        *([] if "    f()" not in failed.output else ["    f()"]),
        '  File "code.py", line 2, in f',
        "    return 1 / 0",
        *(["           ~~^~~"] if "~~^~~" in failed.output else []),
        "ZeroDivisionError: division by zero",
    ]
    syntax = run("print(")
    assert (syntax.code, "SyntaxError" in syntax.output, "launcher" in syntax.output) == (1, True, False)
    assert run("import sys; sys.exit(3)") == Result("", 3)
    assert run("print('\\u00e9\\ud800', None)\nNone").output == "\u00e9? None\n"
    assert run("x = '" + "y" * 200_000 + "'\nlen(x)").output == "200000\n"


@sandboxed
def test_stdin_is_empty() -> None:
    assert run("import sys\nprint(repr(sys.stdin.read()))\ninput()").output.splitlines()[0] == "''"
    assert "EOFError" in run("input()").output


@sandboxed
def test_an_endless_loop_is_stopped() -> None:
    start = time.perf_counter()
    result = run("print('on')\nwhile True: pass", seconds=0.4)
    assert (result.timed_out, result.output) == (True, "on\n")
    assert time.perf_counter() - start < 1.5
    sleeping = run("import os, time\nos.close(1); os.close(2)\ntime.sleep(9)", seconds=0.4)
    assert sleeping.timed_out and time.perf_counter() - start < 3


@sandboxed
def test_a_fork_bomb_ends_with_its_sandbox() -> None:
    code = "import os, time\nn = 0\ntry:\n  while n < 99:\n    n += 1\n    if os.fork() == 0: time.sleep(60)\n"
    result = run(code + "except OSError: print('refused', n)")
    assert result.output.startswith("refused") and int(result.output.split()[1]) <= LIMITS.processes
    bomb = run("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", seconds=0.4)
    assert bomb.timed_out


@sandboxed
def test_memory_and_files_are_limited() -> None:
    assert run("b'x' * 10**9").output.endswith("MemoryError\n")
    big = run("open('/tmp/x', 'w').write('x' * 5_000_000)")
    assert big.code != 0 and ("File too large" in big.output or big.code == -25)  # SIGXFSZ
    many = "for n in range(999): open(f'/tmp/{n}', 'wb').write(b'x' * 10**6)"
    assert "No space left on device" in run(many, memory_mb=64).output


@sandboxed
def test_a_million_characters_are_cut() -> None:
    result = run("print('a' + 'x' * 10**6 + 'z')")
    assert len(result.output) == 400 and "\n[1000003 characters, cut]\n" in result.output
    assert result.output[0] + result.output[-2:] == "az\n"
    assert run("while True: print('x' * 9999)", seconds=0.4).timed_out


@sandboxed
def test_the_machine_is_out_of_sight(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("42")
    hidden = [
        "/etc/shadow",
        "/etc/passwd",
        f"{tmp_path}/secret",
        str(Path.home() / ".bashrc"),
        "/root",
        "/home",
        "/var",
    ]
    code = f"import os\nprint([p for p in {hidden} if os.path.exists(p) or os.access(p, os.R_OK)])"
    assert run(code).output == "[]\n"
    written = "for p in ('/usr/x', '/x', '/dev/x', '/dev/shm/x', '/proc/x'):\n  try: open(p, 'w'); print(p)\n"
    assert run(written + "  except OSError: pass").output == ""
    usual = {"HOME", "PATH", "PWD", "LC_CTYPE"}
    assert (
        run(f"import os\nset(os.environ) - {usual}, os.getpid() < 9, os.getcwd()").output == "(set(), True, '/tmp')\n"
    )


@sandboxed
def test_calls_share_nothing() -> None:
    assert run("open('/tmp/left', 'w').write('x')").output == "1\n"
    assert run("import os; os.listdir('/tmp')").output == "[]\n"


@sandboxed
def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert "ConnectionRefusedError" in run(code).output
        assert "Network is unreachable" in run(code.replace("127.0.0.1", "192.0.2.1")).output


@sandboxed
def test_it_holds_no_rights() -> None:
    code = "import os\nopen('/proc/self/status').read().split('CapEff:')[1].split()[0], os.getuid() != 0"
    assert run(code).output == "('0000000000000000', True)\n"
    unshare = "import ctypes\nctypes.CDLL(None).unshare(0x10000000)"  # another user namespace
    assert run(unshare).output == "-1\n"


@sandboxed
def test_calls_run_side_by_side() -> None:
    results: list[str] = []
    threads = [threading.Thread(target=lambda n=n: results.append(run(f"{n} * 2").output)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=int) == [f"{n * 2}\n" for n in range(6)]


@pytest.fixture
def config(tmp_path: Path) -> PythonTool:
    rows = [json.dumps({"prompt": f"{n} squared?", "answer": n * n}) for n in range(40)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(rows))
    return PythonTool(path=f"{tmp_path}/tasks.jsonl", reward=Rewards(numeric=Numeric()))


def call(code: str) -> dict[str, str]:
    arguments = json.dumps({"name": "python", "arguments": {"code": code}})
    return {"role": "assistant", "content": f"<tool_call>{arguments}</tool_call>"}


@sandboxed
def test_an_episode(config: PythonTool) -> None:
    task = config.tasks("train", 0)[0]
    env = config.make()
    reset = env.reset(task)
    assert reset.tools[0]["function"]["parameters"]["required"] == ["code"]
    step = env.step(call(f"{task.data['answer']} + 0"))
    assert [m["content"] for m in step.messages] == [str(task.data["answer"])]
    step = env.step({"role": "assistant", "content": f"<answer>{task.data['answer']}</answer>"})
    assert (step.reward, step.terminated, step.info["success"], step.info["calls"]) == (1.0, True, True, 1)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (Result("1\n", 0), "1"),
        (Result("", 0), "[no output]"),
        (Result("Error\n", 1), "Error"),
        (Result("", 3), "[exit code 3]"),
        (Result("a\n", -9), "a\n[killed by signal 9]"),
        (Result("a", -9, timed_out=True), "a\n[stopped after 2 s]"),
    ],
)
def test_what_the_policy_is_told(result: Result, text: str) -> None:
    assert observation(result, 2.0) == text


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    check_sandbox.cache_clear()
    yield monkeypatch
    check_sandbox.cache_clear()


def test_without_a_sandbox_it_refuses(config: PythonTool, broken: pytest.MonkeyPatch) -> None:
    install = r"install bubblewrap 0\.8 or newer \(apt-get install bubblewrap\) and allow unprivileged user namespaces"
    broken.setattr(shutil, "which", lambda *a, **k: None)
    with pytest.raises(ConfigError, match=rf"bwrap \(bubblewrap\) is not installed: {install}, or set env.unsafe=true"):
        config.tasks("train", 0)
    broken.undo()
    if shutil.which("sh") is None:
        pytest.skip("no shell")
    broken.setattr(isolation, "_sandbox", lambda mb: ["/bin/sh", "-c", "echo bwrap: No permissions >&2; exit 1"])
    broken.setattr(shutil, "which", lambda *a, **k: "/usr/bin/true")
    with pytest.raises(ConfigError, match=rf"the sandbox does not start \(bwrap: No permissions\): {install}, or set"):
        config.tasks("train", 0)


def test_a_sandbox_that_fails_later_is_no_observation(config: PythonTool, broken: pytest.MonkeyPatch) -> None:
    """The episode is then an error, out of the loss."""
    env = config.make()
    env.reset(Task("t", {"messages": [{"role": "user", "content": "?"}], "answer": 1, "record": {}}))
    broken.setattr(isolation, "check_sandbox", lambda: None)
    broken.setattr(isolation, "_sandbox", lambda mb: ["/bin/sh", "-c", "echo bwrap: out of processes; exit 1"])
    with pytest.raises(OSError, match="bwrap: out of processes"):
        env.step(call("1"))


def test_unsafe_code_has_limits_too(config: PythonTool, caplog: pytest.LogCaptureFixture) -> None:
    unsafe = config.model_copy(update={"unsafe": True, "call_timeout_s": 5.0})
    with caplog.at_level(logging.WARNING):
        unsafe.tasks("train", 0)
    assert "env.unsafe: the policy's code runs as this user, without a sandbox" in caplog.text
    result = run_python("import os\nprint(os.getuid(), 'HOME' in os.environ)\ninput()", LIMITS, unsafe=True)
    assert result.output.startswith(f"{os.getuid()} True\n") and "EOFError" in result.output
    stopped = Limits(**{**vars(LIMITS), "seconds": 0.4})
    assert run_python("import time; time.sleep(9)", stopped, unsafe=True).timed_out
    assert run_python("b'x' * 10**9", LIMITS, unsafe=True).output.endswith("MemoryError\n")
    left = "import os, time\nif os.fork() == 0: time.sleep(30)\nprint(1)"  # holds on to stdout
    assert run_python(left, stopped, unsafe=True).timed_out
