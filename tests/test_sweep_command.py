"""`python -m ppojax.sweep`: what is checked before anything runs, how it ends, and a real sweep of two cells."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ppojax import sweep
from ppojax.sweep import command
from ppojax.sweeping.cells import Cell
from ppojax.sweeping.figures import LOSSES
from ppojax.sweeping.record import Record
from ppojax.sweeping.run import How
from sweeping.test_sweep_page import DONE, PLAN
from tiny_config import TINY


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))


def test_dry_run_says_which_cells_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    assert command([*TINY, "mesh=1x2x1,1x3x1", f"out={out}", "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "mesh_1x2x1x1: ok" and second.startswith("mesh_1x3x1x1: invalid: mesh.fsdp=3 (command line)")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["mesh=1x3x1"], "ppojax: error: mesh_1x3x1x1: mesh.fsdp=3 (command line), model.fresh.width=32"),
        (["mesh=8"], "ppojax: error: mesh=8: expected devices along data x fsdp x tensor"),
        (
            ["rollout.promts=4"],
            "ppojax: error: unknown key rollout.promts (command line); did you mean",
        ),
        (["steps=0"], "ppojax: error: steps=0 (command line): expected int >= 1"),
        (["target=h300:8"], "ppojax: error: target=h300:8: h300 is not known to the planner"),
        (["limits_s=3"], "ppojax: error: unknown key limits_s (command line)"),
    ],
)
def test_what_cannot_be_swept(arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*TINY, *arguments]) == 2
    assert errors(capsys)[0].startswith(fault)


def test_a_base_that_only_holds_with_a_cell_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*TINY, "mesh.fsdp=3", "mesh=1x2x1", "--dry-run"]) == 0
    assert command([*TINY, "sed=1", "mesh=1x2x1,1x3x1"]) == 2  # told once where it is wrong everywhere
    first, *others = errors(capsys)
    assert first.startswith("ppojax: error: unknown key sed") and others
    assert all(line.startswith("ppojax: error: mesh_1x3x1x1: ") for line in others)


def test_help_lists_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0
    text = capsys.readouterr().out
    assert "python -m ppojax.sweep config=" in text and "  microbatch: str" in text


class Cells:
    """Stands in for `run_cells`."""

    def __init__(self, *records: Record) -> None:
        self.records, self.how = records, None

    def __call__(self, cells: Sequence[Cell], how: How) -> Iterator[Record]:
        self.how = how
        return iter(self.records)


def test_cells_that_failed_decide_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Record(cell=Cell("1x2x1x1"), key="", state="failed", reason="no [bold]weights", code=3)
    monkeypatch.setattr(sweep, "run_cells", Cells(DONE[0], failed))
    assert command([*TINY, f"out={tmp_path}"]) == 3
    assert errors(capsys) == ["ppojax: error: 1 of 2 cells failed: mesh_1x2x1x1: no [bold]weights"]
    assert "no [bold]weights" in (tmp_path / "sweep.html").read_text()
    killed = failed.model_copy(update={"code": -9})
    monkeypatch.setattr(sweep, "run_cells", Cells(killed))
    assert command([*TINY, f"out={tmp_path}"]) == 1
    (tmp_path / "file").write_text("")
    assert command([*TINY, f"out={tmp_path}/file/x"]) == 73


def test_a_target_is_planned_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = Cells(Record(cell=Cell(), key="", state="done", planned=PLAN))
    monkeypatch.setattr(sweep, "run_cells", cells)
    assert command([*TINY, f"out={tmp_path}", "target=h200:8", "compile=false", "price=3.5"]) == 0
    assert cells.how is not None and cells.how.plan == ("target=h200:8", "compile=false", "price=3.5")
    assert "321.0 tokens/s/device" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two meshes take the same first step, one cell cannot be, one fails; nothing is measured twice."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    out = tmp_path / "sweep"
    base = [*TINY, "critic.model.type=cut", "update.minibatches=1", "update.microbatch_rows=8", "steps=2", f"out={out}"]
    arguments = [*base, "mesh=1x1x1,2x2x1,1x3x1"]
    assert command(arguments) == 0, capsys.readouterr().err
    read = rows(out)
    assert [row["state"] for row in read] == ["done", "done", "invalid"]
    one, four, _ = read
    assert four["equality"] == "equal" and float(four["difference_from_reference"]) < 1e-3
    assert all(float(four[f"first_step_{name}"]) for name in LOSSES)
    assert one["devices"] == "1" and four["devices"] == "4"
    assert float(four["compile_seconds_cached"]) < float(four["compile_seconds_cold"]) / 3
    assert float(four["sent_bytes_actor_update_fsdp"]) > 0 and int(four["host_peak_rss_bytes"]) > 2**28
    assert not list(out.glob("*/compiled"))
    stamps = [path.stat().st_mtime_ns for path in sorted(out.glob("*/record.json"))]
    assert command([*base, "mesh=1x1x1", "critic=/nowhere/at/all"]) == 3
    assert "/nowhere/at/all is " in capsys.readouterr().err
    assert command(arguments) == 0
    kept = [path for path in sorted(out.glob("*/record.json")) if "critic" not in path.parent.name]
    assert [path.stat().st_mtime_ns for path in kept] == stamps


@pytest.mark.slow
def test_a_real_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *TINY,
        "update.minibatches=1",
        "update.shared_prefix=false",
        "mesh=1x8x1,2x4x1",
        "microbatch=8",
        "target=h200:8",
        "compile=false",
        "price=3",
    ]
    assert command([*arguments, f"out={tmp_path}"]) == 0, capsys.readouterr().err
    read = rows(tmp_path)
    assert [(row["state"], row["target"], row["fits"]) for row in read] == [("done", "h200:8", "True")] * 2
    assert all(float(row["sent_bytes_actor_update_fsdp"]) > 0 and float(row["dollars"]) > 0 for row in read)
    assert "estimated by formula; nothing was run" in (tmp_path / "sweep.html").read_text()
