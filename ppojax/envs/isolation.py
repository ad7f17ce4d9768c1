"""Runs Python code that nobody vouches for: in a sandbox of its own, with limits, killed when its time is up."""

from __future__ import annotations

import codecs
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from ppojax.envs.output import Output
from ppojax.errors import ConfigError

_NOBODY = 65_534
_INSTALL = "install bubblewrap 0.8 or newer (apt-get install bubblewrap) and allow unprivileged user namespaces"
# Written before the code runs, so that a sandbox that does not start is told from code that fails.
_STARTED = b"\0"
# Reads the code, gives it an empty stdin and its limits, runs it, and shows the value of a last line that is one.
_LAUNCHER = """
import ast, linecache, os, resource, sys, traceback
code = sys.stdin.buffer.read().decode()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for name, value in (limit.split("=") for limit in sys.argv[1:]):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(value), int(value)))
sys.stdout.reconfigure(errors="replace", line_buffering=True)
sys.argv = ["code.py"]
os.write(1, b"\\0")
linecache.cache["code.py"] = (len(code), None, code.splitlines(True), "code.py")
try:
    tree, last = ast.parse(code, "code.py"), None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    scope = {"__name__": "__main__"}
    exec(compile(tree, "code.py", "exec"), scope)
    if last is not None and (value := eval(compile(last, "code.py", "eval"), scope)) is not None:
        print(repr(value))
except Exception as error:
    sys.stdout.flush()
    trace = error.__traceback__.tb_next
    traceback.print_exception(type(error), error, None if isinstance(error, SyntaxError) else trace)
    sys.exit(1)
"""


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    seconds: float
    memory_mb: int  # of each process, and of the files in /tmp together
    processes: int
    file_mb: int
    output_chars: int  # kept, half from the start and half from the end

    def arguments(self) -> list[str]:
        """Write them for the launcher, as resource limits."""
        limits = {
            "CPU": int(self.seconds) + 1,
            "AS": self.memory_mb << 20,
            "NPROC": self.processes,
            "FSIZE": self.file_mb << 20,
            "NOFILE": 64,
            "CORE": 0,
        }
        return [f"{name}={value}" for name, value in limits.items()]


@dataclass(frozen=True)
class Result:
    """What code wrote, stdout and stderr together, and how it ended."""

    output: str
    code: int  # of the process: 0, an error's, or minus the signal that killed it
    timed_out: bool = False


def run_python(code: str, limits: Limits, *, unsafe: bool = False) -> Result:
    """Run Python code without network, on a read-only system, with a /tmp of its own that is gone afterwards.

    `unsafe` leaves the sandbox out: limits hold, but the code reads and writes what this user can, network included.

    Raises:
        ConfigError: there is no sandbox here (see `check_sandbox`).
        OSError: the sandbox did not start.
    """
    if unsafe:
        return _run([sys.executable], code, limits)
    check_sandbox()
    user = _NOBODY if os.geteuid() == 0 else None
    return _run([*_sandbox(limits.memory_mb), _interpreter()[0]], code, limits, user)


@cache
def check_sandbox() -> None:
    """Try the sandbox once. Raises ConfigError naming what is missing and what to install."""
    if sys.platform != "linux" or shutil.which("bwrap") is None:
        raise ConfigError(f"env.type=python: bwrap (bubblewrap) is not installed: {_INSTALL}, or set env.unsafe=true")
    user = _NOBODY if os.geteuid() == 0 else None
    limits = Limits(10.0, 512, 16, 1, 2000)
    try:
        _run([*_sandbox(64), _interpreter()[0]], "", limits, user)
    except OSError as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"env.type=python: the sandbox does not start ({said:.200}): {_INSTALL}, or set env.unsafe=true"
        ) from error


def _sandbox(tmp_mb: int) -> list[str]:
    """The bubblewrap command in front of a program."""
    words = f"{shutil.which('bwrap')} --unshare-all --unshare-user --disable-userns --cap-drop ALL --die-with-parent"
    words += " --new-session --clearenv --ro-bind /usr /usr --ro-bind-try /etc/ld.so.cache /etc/ld.so.cache"
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            words += f" --symlink usr/{name} {path}"
        elif path.is_dir():
            words += f" --ro-bind {path} {path}"
    command = words.split()
    _, prefix = _interpreter()
    if not prefix.is_relative_to("/usr"):
        command += ["--ro-bind", str(prefix), str(prefix)]
    end = f"--proc /proc --dev /dev --remount-ro /dev --size {tmp_mb << 20} --tmpfs /tmp --chdir /tmp --remount-ro /"
    return [*command, *end.split(), "--setenv", "HOME", "/tmp", "--setenv", "PATH", "/usr/bin:/bin", "--"]


@cache
def _interpreter() -> tuple[str, Path]:
    """A Python that the sandbox's user can reach, and the folder that it is installed in."""
    own = (os.path.realpath(sys.executable), Path(sys.base_prefix).resolve())
    reachable = all(folder.stat().st_mode & 0o001 for folder in (own[1], *own[1].parents))
    if os.geteuid() != 0 or reachable:
        return own
    found = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if found is None:
        raise ConfigError(
            f"env.type=python: {own[0]} is only for root, and code does not run as root: install python3 in /usr/bin, "
            "or set env.unsafe=true"
        )
    return found, Path("/usr")


def _run(command: list[str], code: str, limits: Limits, user: int | None = None) -> Result:
    """Run the launcher; `user` is who to become first, because a limit on processes does not hold for root."""
    deadline = time.monotonic() + limits.seconds
    with TemporaryDirectory(prefix="ppojax-") as folder:  # where code without a sandbox writes
        process = subprocess.Popen(
            [*command, "-I", "-S", "-c", _LAUNCHER, *limits.arguments()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else (),
            cwd="/" if user is not None else folder,
            env={"PATH": os.defpath, "HOME": folder},
        )
        output = Output(limits.output_chars)
        try:
            started, in_time = _talk(process, code.encode("utf-8", "replace"), output, deadline)
        finally:
            # The group too: what the code started may still run. A sandbox dies with its first process.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
    if not started:
        raise OSError(output.text() or f"it ended with code {status} before it ran anything")
    # bwrap reports a signal as a shell does.
    return Result(output.text(), 128 - status if status > 128 else status, timed_out=not in_time)


def _talk(process: subprocess.Popen[bytes], data: bytes, output: Output, deadline: float) -> tuple[bool, bool]:
    """Feed stdin, read stdout until it ends and wait for the end: did it start, and was it in time."""
    assert process.stdin is not None and process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    os.set_blocking(process.stdin.fileno(), False)
    started = False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    data = _feed(process.stdin, data)
                    if not data:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not started and chunk.startswith(_STARTED):
                    started, chunk = True, chunk[1:]
                    if not chunk:
                        continue
                output.add(decoder.decode(chunk, final=not chunk))
                if not chunk:
                    return started, _ended(process, deadline)
    return started, False


def _feed(pipe: IO[bytes], data: bytes) -> bytes:
    """Write what the pipe takes; return what is left."""
    try:
        return data[os.write(pipe.fileno(), data[: 1 << 16]) :]
    except BrokenPipeError:
        return b""


def _ended(process: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        process.wait(max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        return False
    return True
