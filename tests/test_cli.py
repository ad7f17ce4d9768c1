"""The boundary that every command shares, and how fast a fault is told."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from pydantic import Field

from ppojax.cli import Flags, run_command
from ppojax.errors import DataError, DivergedError, Preempted
from ppojax.settings import Settings

FAULTY = ("env.type=calculator", "model.path=smollm2", "actor.optimizer.learning_rte=1e-6")
UNKNOWN = "ppojax: error: unknown key actor.optimizer.learning_rte (command line); did you mean "


class Toy(Settings):
    """A toy."""

    steps: int = Field(1, ge=1, description="How often.")


def echo(config: Toy, flags: Flags) -> int:
    """Print what arrived."""
    print(f"steps {config.steps}, dry {flags.dry_run}")
    return 0


def test_settings_and_flags_reach_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(echo, ["steps=3", "--dry-run"], Toy) == 0
    assert run_command(echo, [], Toy) == 0
    assert capsys.readouterr().out == "steps 3, dry True\nsteps 1, dry False\n"


def test_the_exit_code_of_the_command_is_returned() -> None:
    assert run_command(lambda config, flags: 75, [], Toy) == 75


def test_faults_are_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(echo, ["stps=3", "steps=0", "--dry-rum"], Toy) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "ppojax: error: unknown flag --dry-rum; did you mean --dry-run?",
        "ppojax: error: unknown key stps (command line); did you mean steps?",
        "ppojax: error: steps=0 (command line): expected int >= 1",
    ]


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(echo, ["st\x1b[2Jeps=\x07"], Toy) == 2
    assert "\x1b" not in (err := capsys.readouterr().err) and r"st\x1b[2Jeps" in err


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("no weights"), 3), (DivergedError("nan"), 4), (Preempted("saved"), 75)]
)
def test_each_fault_has_its_exit_code(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Toy, flags: Flags) -> int:
        raise error

    assert run_command(main, [], Toy) == code
    assert capsys.readouterr().err == f"ppojax: error: {error}\n"


def test_a_bug_keeps_its_trace() -> None:
    def main(config: Toy, flags: Flags) -> int:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_command(main, [], Toy)


def test_ctrl_c_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Toy, flags: Flags) -> int:
        raise KeyboardInterrupt

    assert run_command(main, [], Toy) == 130
    assert capsys.readouterr().err == "ppojax: interrupted\n"


def test_help_runs_nothing_and_reads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(echo, ["config=nosuch.yaml", "--help"], Toy) == 0
    out = capsys.readouterr().out
    assert "usage: python -m ppojax.test_cli [config=a.yaml,b.yaml]" in out
    assert "  steps: int >= 1 (default 1)\n      How often.\n" in out
    assert run_command(echo, ["-h"], Toy) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("arguments", [["--help", "steps"], ["--help=steps"], ["--help", "steps", "steps=7"]])
def test_help_of_a_key(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(echo, arguments, Toy) == 0
    assert capsys.readouterr().out == "  steps: int >= 1 (default 1)\n      How often.\n"


def test_help_of_no_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(echo, ["--help", "step"], Toy) == 2
    assert "ppojax: error: --help step: there is no such section or key; did you mean steps?" in capsys.readouterr().err


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(echo, ["steps=4", "--print-config"], Toy) == 0
    assert capsys.readouterr().out == "steps: 4  # from command line\n"


def fresh(code: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run code in a new process; also give the processor seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


PROBE = """
import sys
from ppojax.cli import run_command
code = run_command(lambda config, flags: 0, sys.argv[1:])
loaded = sorted({"jax", "flax", "optax", "orbax", "grain", "torch"} & set(sys.modules))
print("imported:", *loaded)
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [FAULTY, ("--help",), ("--help", "loss"), ("config=nosuch.yaml",)])
def test_jax_is_not_imported_to_tell_a_fault_or_help(arguments: tuple[str, ...]) -> None:
    done, _ = fresh(PROBE, *arguments)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


def test_a_mistyped_key_is_told_in_under_a_second() -> None:
    code = "import runpy, sys; sys.argv[0] = 'train'; runpy.run_module('ppojax.train', run_name='__main__')"
    runs = [fresh(code, *FAULTY) for _ in range(3)]
    for done, _ in runs:
        assert done.returncode == 2
        assert done.stderr == f"{UNKNOWN}actor.optimizer.learning_rate?\n"
    # Processor time, the least of three: on a shared machine a clock measures what else is running.
    assert min(seconds for _, seconds in runs) < 1.0


def test_a_bug_exits_with_one() -> None:
    code = "import sys; from ppojax.cli import run_command\ndef main(c, f): return 1 // 0\n"
    code += "from ppojax.settings import Settings\nclass Toy(Settings): pass\nsys.exit(run_command(main, [], Toy))"
    done, _ = fresh(code)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
