import json
from pathlib import Path

import pytest

from ppojax.errors import CannotWriteError, ConfigError, ExitCode
from ppojax.runtime.rundir import RunDir


def test_nothing_is_written_before_create(tmp_path):
    run = RunDir(tmp_path / "runs" / "a")
    run.check(resume=False)
    assert list(tmp_path.iterdir()) == []


def test_the_layout(tmp_path):
    run = RunDir(str(tmp_path / "runs" / "a"))
    run.create()
    run.write_config("seed: 1\n")
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.yaml", "rollouts"]
    assert run.config.read_text() == "seed: 1\n"
    assert run.transcript(7) == tmp_path / "runs/a/rollouts/step_000007.jsonl"
    assert run.metrics.name == "metrics.jsonl" and run.tensorboard.name == "tensorboard"


def test_an_empty_directory_may_be_used(tmp_path):
    RunDir(tmp_path).create()


def test_a_directory_that_holds_something_is_refused_unless_resuming(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    run = RunDir(tmp_path)
    for attempt in (run.create, lambda: run.check(resume=False)):
        with pytest.raises(ConfigError, match=r"is not empty; use resume=true to go on .*, or another run\.name$"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    run.create(resume=True)


def test_resuming_a_run_that_never_started_starts_it(tmp_path):
    RunDir(tmp_path / "new").create(resume=True)
    assert (tmp_path / "new" / "checkpoints").is_dir()


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "a").write_text("")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"a: is not a directory; choose another run\.name or run\.dir"):
            RunDir(tmp_path / "a").create(resume=resume)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match=r"file/run: cannot be written: Not a directory; choose a writable"):
        RunDir(tmp_path / "file" / "run").create()
    # Refused to root as well.
    with pytest.raises(CannotWriteError, match=r"/proc/run: cannot be written"):
        RunDir(Path("/proc/run")).create()


def test_exit_json_says_why_and_what_next(tmp_path):
    run = RunDir(tmp_path)
    run.write_exit(ExitCode.PREEMPTED, "stopped by SIGTERM", 12, 12, "resume=true goes on")
    assert json.loads(run.exit.read_text()) == {
        "code": 75,
        "reason": "stopped by SIGTERM",
        "step": 12,
        "last_checkpoint": 12,
        "hint": "resume=true goes on",
    }
    run.write_exit(ExitCode.BUG, "KeyError('x')", None, None, "")
    assert json.loads(run.exit.read_text())["code"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_the_exit_of_an_earlier_attempt_does_not_outlive_a_restart(tmp_path):
    run = RunDir(tmp_path)
    run.write_exit(ExitCode.PREEMPTED, "stopped", 1, 1, "")
    run.create(resume=True)
    assert not run.exit.exists()


def test_an_exit_that_cannot_be_noted_does_not_hide_the_fault(tmp_path, caplog):
    RunDir(tmp_path / "absent").write_exit(ExitCode.CANNOT_WRITE, "disk full", 3, None, "")
    assert "exit.json: cannot be written: No such file or directory" in caplog.text
