"""`python -m ppojax.report`: the page it writes, against numbers worked by hand, and one line for what it cannot do."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from html_page import Page
from ppojax import report
from ppojax.cli import run_command
from ppojax.report import ReportConfig
from ppojax.reporting.chart import PARTS, ticks
from ppojax.reporting.document import TRUST, time_split
from ppojax.reporting.runs import find_runs
from ppojax.types import Ending
from ppojax.viewer.page import SCRIPT
from report_run import config, spoil, write_run, write_values
from viewer_run import HOSTILE, row, write_step


def command(*arguments: str) -> int:
    return run_command(report.main, arguments, ReportConfig)


def cells(text: str) -> list[list[str]]:
    """The rows of all tables, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.S)
    return [[re.sub("<.*?>", "", cell).strip() for cell in re.findall("<t[dh]>(.*?)</t[dh]>", r, re.S)] for r in rows]


GRPO = config(advantage={"type": "group"}, critic=None, loss={"type": "ppo", "clip": 0.2})


def comparison(folder: Path) -> Path:
    """Three seeds of PPO with a critic, one of them diverged; two of GRPO."""
    metrics = {"critic/vf_explained_var": 0.5, "trust_region/masked_frac": 0.01}
    rows = dict.fromkeys((1, 2, 3, 4), metrics)
    for seed, rewards in enumerate(([0.0, 0.2, 0.4, 0.8], [0.2, 0.4], [0.1, 0.3, 0.5, 1.0])):
        code, reason = (4, "no finite gradient") if seed == 1 else (0, "done")
        path = write_run(
            folder / f"ppo-{seed}", rewards, settings=config(seed=seed), rows=rows, code=code, reason=reason
        )
        write_values(path, len(rewards))
    for seed in (0, 1):
        settings = {**GRPO, "seed": seed}
        write_run(
            folder / f"grpo-{seed}", [0.1, 0.1, 0.3, 0.5], settings=settings, success={0: 0.25, 4: 0.5 + seed / 4}
        )
    return folder


def test_the_page_has_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison(tmp_path)
    out = tmp_path / "report.html"
    assert command(f"runs={tmp_path}/ppo-*,{tmp_path}/grpo-*", f"out={out}", "names=mini-critic,GRPO", "last=2") == 0
    said = capsys.readouterr().out
    assert f"GRPO: {tmp_path}/grpo-0, {tmp_path}/grpo-1\n" in said and said.endswith(f"written to {out}\n")
    text = out.read_text()
    rows = cells(text)
    assert rows[1][:3] == ["mini-critic", "3 (1 not done)", "0.550 [0.300, 0.750]"]  # final: .6, .3, .75
    assert rows[2] == ["GRPO", "2", "0.400", "0.625", "400", "8"]
    assert rows[4] == ["mini-critic", "GRPO", "0.667"]  # .6 and .75 beat .4 twice each, .3 does not
    ended = {r[0].split("/")[-1]: r for r in rows if len(r) == 10}
    assert ended["ppo-1"][-1] == "diverged after step 2 of 4: no finite gradient"
    assert ended["ppo-1"][2:5] == ["1", "2", "0.300"] and ended["grpo-1"][5] == "0.750 [0.650, 0.850]"
    assert "No interval, fewer than 3 seeds:</strong> GRPO." in text
    assert f"1 did not come to their end: {tmp_path}/ppo-1." in text
    assert "No critic, so no values: GRPO." in text and "No trust region was logged: GRPO." in text
    assert "mini-critic: 12 actions of 3 steps" in text and "No run had several critics" in text
    assert rows[-2][0] == "mini-critic" and rows[-2][1:] == ["0.75", "0.25", "0", "0", "0", "0.5", "0.5", "2"]
    found = Page(text)
    names = [t for tag, attrs, t in found.all("text") if attrs.get("class") == "name"]
    for title in ("reward/mean against tokens", "val/success", "critic/vf_explained_var", "value calibration"):
        assert title in names
    assert "critic/value_std" not in names and "disagreement and error" not in names  # no empty box
    assert len(found.all("section")) == 2  # transcripts, of the method that has some
    assert "No transcript of GRPO." in text


def test_the_curve_is_the_rewards(tmp_path: Path) -> None:
    """Seven points on a straight line are drawn on one, from corner to corner of the axes."""
    write_run(tmp_path / "a", [0.1 * n for n in range(7)])
    assert command(f"runs={tmp_path}/a", f"out={tmp_path}/r.html", "episodes=0") == 0
    text = (tmp_path / "r.html").read_text()
    line = re.findall(r'<path class="s c0 d0" d="M([^"]*)"><title>', text)[0]
    points = np.array([list(map(float, p.split())) for p in line.split("L")])
    assert points[0].tolist() == [48, 196] and points[-1].tolist() == [410, 22]
    assert np.ptp(np.diff(points, axis=0), axis=0) == pytest.approx([0, 0], abs=0.2)
    assert "Transcripts" not in text


def test_several_critics(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [0.5], rows={1: {"critic/value_std": 0.1}})
    write_values(folder, 1, critics=3)
    assert command(f"runs={folder}", f"out={tmp_path}/r.html") == 0
    text = (tmp_path / "r.html").read_text()
    assert "disagreement and error" in text and "critic/value_std" in text and "No run had several" not in text


def test_nothing_of_a_run_is_obeyed(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\x1b\u202e"
    settings = config(loss={"type": "</style><b>", "delta": bad})
    folder = write_run(tmp_path / "<img src=x onerror=alert(2)>", [0.5], settings=settings, code=4, reason=bad)
    write_run(tmp_path / "other", [0.5], settings=config(loss={"type": "</style><b>", "delta": "&quot;"}))
    n = len(HOSTILE)
    rows = [row(HOSTILE, "0" + "1" * (n - 1), ending=Ending.ERROR, info={"error": bad})]
    write_step(folder, 1, rows, [HOSTILE], advantage_BT=np.ones((1, n), np.float32))
    out = tmp_path / "r.html"
    assert command(f"runs={tmp_path}/*", f"out={out}", 'title="</title><script>alert(3)</script>"') == 0
    text = out.read_text()
    found = Page(text)
    assert {attrs.get("type") for _, attrs, _ in found.all("script")} == {"application/json", None}
    assert [t for _, attrs, t in found.all("script") if not attrs] == [SCRIPT]
    assert not found.all("img") and "default-src 'none'" in text
    for tag, attrs, _ in found.elements:
        assert not any(name.startswith("on") or name in ("src", "href", "style") for name in attrs), (tag, attrs)
    assert "diverged after step 1 of 4: &lt;script&gt;" in text and all(c in "\n" or c.isprintable() for c in text)


def test_time_split(tmp_path: Path) -> None:
    rows = {1: {"timing_s/step": 90.0}, 3: {"timing_s/step": 4.0, "timing_s/sync": 1.0, "timing_s/values": 0.5}}
    write_run(tmp_path / "a", [0.1, 0.2, 0.3], rows=rows)
    split = time_split(find_runs(str(tmp_path / "a")))
    # Without the first step: gen without its wait, and what is left of steps of 2 and 4 s.
    assert split is not None
    expected = {"gen": 0.75, "env_wait": 0.25, "sync": 0.5, "values": 0.25}
    expected |= {"update_critic": 0, "update_actor": 0.5, "rest": 0.75}
    assert dict(zip(PARTS, split, strict=True)) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]), (1.0, 4.0, [1, 2, 3, 4]), (-0.1, 0.1, [-0.1, -0.05, 0, 0.05, 0.1])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("runs={run}/none",), 2, "there is no run (no {run}/none/config.yaml); give the folder of one"),
        (("runs={run}/x*",), 2, "runs={run}/x*: matches no run"),
        ((), 2, "runs"),
        (("runs={run}", "names=a,b"), 2, "names=a,b: expected 1 different names"),
        (("runs={run}", "tasks=envs"), 2, "tasks=envs: is no setting of the runs"),
        (("runs={run}", "last=0"), 2, "last"),
        (("runs={run}", "out={run}"), 73, "out={run}: cannot be written: Is a directory; name another file"),
        (("runs={run}", "out={run}/no/r.html"), 73, "cannot be written: No such file or directory"),
        (("runs={run}-empty",), 3, "runs: none of them has done a step"),
        (("runs={run},{run}-half",), 3, "{run}-half/metrics.jsonl: is no list of metrics"),
        (("runs={run}-torn", "out={run}/r.html"), 3, "{run}-torn/rollouts/step_000001.jsonl:3: no JSON"),
    ],
)
def test_faults(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [0.5])
    write_run(tmp_path / "run-empty", [])
    spoil(write_run(tmp_path / "run-half", [0.5, 0.6]) / "metrics.jsonl", 0, '{"step": 1, "rewa')
    torn = write_run(tmp_path / "run-torn", [0.5], rows={1: {"critic/vf_explained_var": 0.1}})
    write_values(torn, 1)
    spoil(torn / "rollouts/step_000001.jsonl", 2, '{"group": 0, "tok')
    assert command(*(argument.format(run=run) for argument in arguments)) == code
    captured = capsys.readouterr()
    assert said.format(run=run) in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (run / "r.html").exists()


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", [0.5])
    assert command(f"runs={tmp_path}/run", f"out={tmp_path}/r.html", "--dry-run") == 0
    assert "ok: 1 runs of 1 methods would be compared" in capsys.readouterr().out and not (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_ten_runs_of_a_hundred_steps_are_quick_and_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [*TRUST, "critic/vf_explained_var"]
    for n in range(10):
        rows = {step: dict(zip(names, rng.random(len(names)), strict=True)) for step in range(1, 101)}
        settings = config(seed=n % 5, loss={"type": "dppo" if n < 5 else "ipo"})
        write_run(tmp_path / f"run{n}", rng.random(100).tolist(), settings=settings, rows=rows)
        texts = [f"{i % 10} w" for i in range(200)]
        rows_of_step = [row(texts, "0" * 50 + "1" * 150, episode=e, reward=float(e % 2)) for e in range(64)]
        for step in range(96, 101):
            values = rng.random((1, 64, 200)).astype(np.float32)
            write_step(tmp_path / f"run{n}", step, rows_of_step, [texts] * 64, value_MBT=values, advantage_BT=values[0])
    start = time.perf_counter()
    assert command(f"runs={tmp_path}/run*", f"out={tmp_path}/r.html") == 0
    seconds, size = time.perf_counter() - start, (tmp_path / "r.html").stat().st_size
    print(f"{seconds:.1f} s, {size / 1e6:.2f} MB")
    assert size < 2e6 and seconds < 20  # under 10 without the type checks of the tests
