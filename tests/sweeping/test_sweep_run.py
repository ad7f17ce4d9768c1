"""How cells are run: what is kept, what is run again, and what is told of a process that failed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ppojax.errors import CannotWriteError, ConfigError
from ppojax.host_devices import environment_with
from ppojax.sweeping import run
from ppojax.sweeping.cells import Cell
from ppojax.sweeping.record import Measured, Start, read_record
from ppojax.sweeping.run import How, run_cells
from tiny_config import TINY

CELLS = (Cell("1x1x1x1"), Cell("1x2x1x1"), Cell("1x3x1x1"))


PLAN = {  # what is read of a plan
    "compiled": True,
    "target": {"name": "h200:8", "devices": 8, "chip": {"name": "NVIDIA H200"}},
    "fits": False,
    "limit_bytes": 1e11,
    "peak": {"while": "actor", "bytes": 2e11},
    "step_s": 10.0,
    "tokens_per_s_per_device": 300.0,
    "mfu": 0.25,
    "mfu_actor": 0.5,
    "cost": {"price": 3.0, "step": 0.07},
    "parts": {"actor": {"sent_bytes": {"fsdp": 1e9}}},
    "programs": [{"compile_s": 2.0}, {"compile_s": 3.5}],
}


def measured(devices: int = 1) -> Measured:
    step = {"perf/throughput": 10.0, "timing_s/step": 2.0, "actor/loss": 0.5}
    return Measured(
        platform="cpu", device="cpu", devices=devices, steps=(step,), rows=("a", "b"), state_bytes=100,
        peak_bytes=None, peak_rss_bytes=2**30, programs=(),
        start=Start(seconds=3.0, compiled=4, cached=0, compile_seconds=5.0, steps=1),
    )  # fmt: skip


class Processes:
    """Stands in for `subprocess.run`: what each call says and how it ends; by default it measures."""

    def __init__(self) -> None:
        self.calls: list[Sequence[str]] = []
        self.devices: list[str] = []
        self.ends: list[tuple[str, int]] = []

    def __call__(self, command: Sequence[str], *, stdout: Any, env: dict[str, str] | None, **rest: Any) -> Any:
        assert command[:2] == [sys.executable, "-m"]
        self.calls.append(command)
        self.devices.append("" if env is None else env["XLA_FLAGS"].split()[-1])
        said, code = self.ends.pop(0) if self.ends else ("", 0)
        if said == "hangs":
            raise subprocess.TimeoutExpired(command, rest["timeout"])
        stdout.write(said)
        if command[2] == "ppojax.plan" and not said:
            Path(command[-1].removeprefix("out=")).write_text(json.dumps(PLAN))
        elif command[2] == "ppojax.sweeping.measure" and code == 0:
            Path(command[3]).write_text(measured().model_dump_json())
        return subprocess.CompletedProcess(command, code)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    stand_in = Processes()
    monkeypatch.setattr(run.subprocess, "run", stand_in)
    return stand_in


def how(folder: Path, steps: int = 3, cached: bool = True) -> How:
    return How(TINY, steps, cached, 60.0, folder)


def test_each_cell_is_started_twice_with_its_own_devices(tmp_path: Path, processes: Processes) -> None:
    records = list(run_cells(CELLS, how(tmp_path)))
    assert [record.state for record in records] == ["done", "done", "invalid"]
    assert "mesh.fsdp may be 1, 2, 4" in records[2].reason and records[2].code == 2
    first, again, third, _ = processes.calls
    assert (first[4], again[4]) == ("3", "1")
    assert first[5:] == again[5:] == [*TINY, *run.PLAIN, *CELLS[0].arguments(), first[-1]]
    assert first[-1] == f"run.compilation_cache={tmp_path}/mesh_1x1x1x1/compiled" != third[-1]
    flag = "--xla_force_host_platform_device_count"
    assert processes.devices == [f"{flag}=1", f"{flag}=1", f"{flag}=2", f"{flag}=2"]
    assert records[0].measured == measured() and records[0].again == measured().start


def test_what_was_measured_is_kept(tmp_path: Path, processes: Processes) -> None:
    before = list(run_cells(CELLS[:1], how(tmp_path)))
    assert list(run_cells(CELLS[:2], how(tmp_path)))[:1] == before and len(processes.calls) == 4
    list(run_cells(CELLS[:1], how(tmp_path, steps=4, cached=False)))  # other settings are another measurement
    assert len(processes.calls) == 5
    (tmp_path / CELLS[0].name / "record.json").write_text("{")
    list(run_cells(CELLS[:1], how(tmp_path, steps=4, cached=False)))
    assert len(processes.calls) == 6


@pytest.mark.parametrize(
    ("said", "code", "state", "reason"),
    [
        ("x\nppojax: error: env: no tasks\n", 3, "failed", "env: no tasks"),
        ("ppojax: error: model.vocab: no\nppojax: error: b\n", 2, "invalid", "model.vocab: no; b"),
        ("Traceback\n  File\nKeyError: 'a'\n", 1, "failed", "KeyError: 'a' (exit 1); see {log}"),
        ("", 1, "failed", "said nothing (exit 1); see {log}"),
        ("", -signal.SIGKILL, "failed", "was ended by SIGKILL; see {log}"),
        ("hangs", 70, "failed", "was not done after limit_s=60 seconds; see {log}, or raise limit_s"),
    ],
)
def test_why_a_cell_failed(tmp_path: Path, processes: Processes, said: str, code: int, state: str, reason: str) -> None:
    processes.ends = [(said, code)]
    (failed,) = run_cells(CELLS[:1], how(tmp_path, cached=False))
    log = tmp_path / CELLS[0].name / "log.txt"
    assert (failed.state, failed.reason, failed.code) == (state, reason.format(log=log), code)
    assert failed.measured is None and read_record(log.with_name("record.json")) == failed


def test_what_failed_is_tried_again(tmp_path: Path, processes: Processes) -> None:
    processes.ends = [("", 1)]
    assert [r.state for r in run_cells(CELLS[:2], how(tmp_path, cached=False))] == ["failed", "done"]
    assert [r.state for r in run_cells(CELLS[:2], how(tmp_path, cached=False))] == ["done", "done"]
    assert len(processes.calls) == 3


def test_a_second_start_that_fails(tmp_path: Path, processes: Processes) -> None:
    processes.ends = [("", 0), ("ppojax: error: gone\n", 3)]
    (record,) = run_cells(CELLS[:1], how(tmp_path))
    assert (record.state, record.reason) == ("failed", "when started again: gone")
    assert read_record(tmp_path / CELLS[0].name / "record.json") == record


def test_a_folder_that_cannot_be_written(tmp_path: Path, processes: Processes) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match=r"record\.json: cannot be written: Not a directory; name another out="):
        list(run_cells(CELLS[:1], how(tmp_path / "file")))


def test_a_folder_of_something_else_stays(tmp_path: Path, processes: Processes) -> None:
    configs = tmp_path / "config"
    configs.mkdir()
    assert next(run_cells([Cell()], how(tmp_path, cached=False))).state == "done"  # it was empty
    (configs / run.RECORD).rename(configs / "my.yaml")
    with pytest.raises(ConfigError, match="config: is to be the folder of a cell, and holds files that no sweep left"):
        next(run_cells([CELLS[0], Cell()], how(tmp_path, cached=False)))
    assert (configs / "my.yaml").exists() and len(processes.calls) == 1


def test_a_cell_that_was_not_finished_is_ours(tmp_path: Path, processes: Processes) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run.subprocess, "run", killed)
        next(run_cells(CELLS[:1], how(tmp_path)))
    left = read_record(tmp_path / CELLS[0].name / run.RECORD)
    assert left is not None and (left.state, left.reason) == ("failed", "was not finished")
    assert next(run_cells(CELLS[:1], how(tmp_path))).state == "done"


def test_another_jax_measures_again(tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("versions", ("jax 99",)), ("platform", ("tpu",))):
        list(run_cells(CELLS[:1], how(tmp_path, cached=False)))
        monkeypatch.setattr(run, name, lambda value=value: value)
        before = len(processes.calls)
        list(run_cells(CELLS[:1], how(tmp_path, cached=False)))
        assert len(processes.calls) == before + 1


def test_a_plan_that_could_not_be_compiled_is_made_again(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLAN, "compiled", False)
    for arguments, made in ((("target=h200:8", "compile=true"), 2), (("target=h200:8", "compile=false"), 3)):
        plan = How(TINY, 3, True, 60.0, tmp_path, arguments)
        for _ in range(2):
            assert next(run_cells(CELLS[:1], plan)).state == "done"
        assert len(processes.calls) == made


def test_plans_are_made_instead(tmp_path: Path, processes: Processes) -> None:
    plan = How(TINY, 3, True, 60.0, tmp_path, ("target=h200:8", "compile=true"))
    processes.ends = [("", 2), ("ppojax: error: model.path=a/b: not known\n", 2), ("ppojax: error: x\n", 0)]
    fits_not, refused = run_cells(CELLS[:2], plan)
    assert processes.calls[0] == [
        *(sys.executable, "-m", "ppojax.plan", *TINY, *run.PLAIN, *CELLS[0].arguments()),
        *("target=h200:8", "compile=true", f"out={tmp_path}/mesh_1x1x1x1/plan.json"),
    ]
    assert processes.devices == ["", ""]  # the planner makes what its target needs
    planned = fits_not.planned
    assert fits_not.state == "done" and planned is not None and not planned.fits and planned.peak_bytes == 2e11
    assert (planned.compile_seconds, planned.dollars, planned.sent) == (5.5, 0.07, {"fsdp": 1e9})
    assert (refused.state, refused.reason) == ("invalid", "model.path=a/b: not known")
    (other,) = run_cells(CELLS[1:2], plan)
    assert other.state == "failed" and other.reason.startswith("left no plan")
    assert next(run_cells(CELLS[:1], plan)) == fits_not and len(processes.calls) == 3


def test_other_flags_of_xla_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=8 --b")
    assert environment_with(4)["XLA_FLAGS"] == "--a=1 --b --xla_force_host_platform_device_count=4"
