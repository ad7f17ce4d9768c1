"""`python -m ppojax.view`: what it writes, and a clear line with the right exit code for what it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ppojax import view
from ppojax.cli import run_command
from ppojax.view import ViewConfig
from ppojax.viewer.app import Viewer
from viewer_run import small_run


def command(*arguments: str) -> int:
    return run_command(view.main, arguments, ViewConfig)


def test_an_episode_becomes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = small_run(tmp_path / "[red]run"), tmp_path / "out.html"
    assert command(f"run={run}", "step=2", "episode=2", f"html={out}", "colour=mask") == 0
    assert capsys.readouterr().out == f"step 2, episode 2 is in {out}\n"
    text = out.read_text(encoding="utf-8")
    assert f"<title>{run}, step 2, episode 2</title>" in text and "id=e_m checked" in text
    assert command(f"run={run}", f"html={out}") == 0
    assert "step 12, group 0, episode 0: terminated" in out.read_text(encoding="utf-8")
    assert command(f"run={run}", "--dry-run") == 0
    assert capsys.readouterr().out.endswith("ok: step 12, episode 0 would be shown\n")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("run={run}", "step=3"), 3, "step=3: run={run} has no transcript of that step; it has 3, 1 to 12"),
        (("run={run}", "episode=7"), 3, "episode=7: {run}/rollouts/step_000012.jsonl has none of that number; it hol"),
        (("run={run}/none",), 3, "run={run}/none: there is no such folder; give the folder of a run"),
        (("run={run}/rollouts",), 3, "there is no transcript in {run}/rollouts/rollouts"),
        (("run={run}", "html={run}"), 73, "html={run}: cannot be written: Is a directory; name another file"),
        (("run={run}", "html={run}/no/x.html"), 73, "cannot be written: No such file or directory"),
        (("run={run}", "steps=3"), 2, "steps"),
        (("run={run}", "colour=red"), 2, "colour"),
        (("step=3",), 2, "run"),
    ],
)
def test_faults(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run")
    assert command(*(argument.format(run=run) for argument in arguments)) == code
    captured = capsys.readouterr()
    assert said.format(run=run) in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_corrupt_transcript_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path / "run")
    path = run / "rollouts/step_000012.jsonl"
    path.write_bytes(path.read_bytes()[:-300])
    assert command(f"run={run}", f"html={tmp_path}/x.html") == 3
    line = capsys.readouterr().err
    assert line.startswith(f"ppojax: error: {path}:5: no JSON (") and line.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run, seen = small_run(tmp_path / "run"), []
    assert command(f"run={run}") == 2
    assert capsys.readouterr().err.endswith("the viewer needs a terminal; html=FILE writes the episode as a page\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(Viewer, "run", lambda app: seen.append((app.at, app.number, app.quantity)))
    assert command(f"run={run}", "step=2", "episode=3", "colour=ratio") == 0
    assert command(f"run={run}") == 0
    assert seen == [(1, 3, "ratio"), (2, 0, "advantage")]
    monkeypatch.setattr(Viewer, "return_code", 1)  # as a bug in it leaves it
    assert command(f"run={run}") == 1


def test_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delitem(sys.modules, "ppojax.viewer.app")
    monkeypatch.setitem(sys.modules, "textual", None)
    assert command(f"run={run}") == 2
    line = capsys.readouterr().err
    assert "pip install 'ppojax[view]'; html=FILE writes a page without it" in line and line.count("\n") == 1
    assert command(f"run={run}", f"html={tmp_path}/out.html") == 0
