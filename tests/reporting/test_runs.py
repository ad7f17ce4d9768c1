"""Runs as they are read for a report: axes by hand, endings in words, one line for each fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppojax.errors import ConfigError, DataError, PpojaxError
from ppojax.reporting.critics import BINS, Judged, judge, to_go
from ppojax.reporting.curves import POINTS, final, make_curve, thin
from ppojax.reporting.methods import group
from ppojax.reporting.runs import Run, find_runs
from report_run import config, spoil, write_run, write_values


def one(folder: Path) -> Run:
    [run] = find_runs(str(folder))
    return run


def test_axes(tmp_path: Path) -> None:
    """Step 3 compiles for 1.5 s of its 4; step 4 is the first of another process."""
    rows = {
        3: {"timing_s/step": 4.0, "compile/seconds": 6.5},
        4: {"timing_s/step": 9.0, "compile/seconds": 6.0},
        5: {"timing_s/step": 3.0, "compile/seconds": 6.0},
    }
    run = one(write_run(tmp_path / "a", [0.1, 0.2, None, 0.4, 0.6], rows=rows, success={0: 0.25, 5: 0.5}))
    assert run.steps == 5 and run.axis("step").tolist() == [1, 2, 3, 4, 5]
    assert run.axis("tokens").tolist() == [100, 200, 300, 400, 500]
    # 2, 2.5 and 3 s of work in steps 2, 3 and 5; the first steps of the processes count as their median.
    assert run.seconds.tolist() == [2.5, 4.5, 7.0, 9.5, 12.5]
    assert run.starts.tolist() == [True, False, False, True, False]
    assert run.compiled == 12.5
    assert final(run, "reward/mean", 2) == 0.5 and final(run, "reward/mean", 3) == pytest.approx(0.4)
    assert run.last("val/success") == 0.5 and run.opening("val/success") == 0.25 and run.opening("reward/mean") is None


def test_seconds_where_compilation_was_not_logged(tmp_path: Path) -> None:
    run = one(write_run(tmp_path / "a", [0.1, 0.2], rows={2: {"compile/seconds": np.nan}}))
    assert run.seconds.tolist() == [2, 4] and run.compiled is None
    assert one(write_run(tmp_path / "b", [0.1])).seconds.tolist() == [2]  # one step: nothing to put in its place


@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        (0, "done", "done"),
        (4, "no finite gradient", "diverged after step 2 of 4: no finite gradient"),
        (75, "SIGTERM", "stopped after step 2 of 4: SIGTERM"),
        (130, "interrupted", "interrupted after step 2 of 4: interrupted"),
        (73, "disk full", "failed with code 73 after step 2 of 4: disk full"),
        (None, "", "goes on or was killed, after step 2 of 4"),
    ],
)
def test_endings(tmp_path: Path, code: int | None, reason: str, said: str) -> None:
    assert one(write_run(tmp_path / "a", [0.1, 0.2], code=code, reason=reason)).ending() == said


def test_folders_patterns_and_torn_lines(tmp_path: Path) -> None:
    for name in ("a-1", "a-2", "b"):
        write_run(tmp_path / name, [0.5])
    (tmp_path / "a-log").mkdir()
    (tmp_path / "a-3").write_text("no folder")
    with (tmp_path / "b/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # as a crash leaves it
    runs = find_runs(f"{tmp_path}/b, {tmp_path}/a-*,{tmp_path}/../{tmp_path.name}/b")
    assert [run.folder.path.name for run in runs] == ["b", "a-1", "a-2"] and runs[0].steps == 1


@pytest.mark.parametrize(
    ("file", "line", "text", "said"),
    [
        (
            "metrics.jsonl",
            0,
            '{"step": 1, "rew',
            "is no list of metrics, expected one object a line, of numbers (see line 1)",
        ),
        ("metrics.jsonl", 1, "[1]", "is no list of metrics, expected one object a line, of numbers (see line 2)"),
        ("metrics.jsonl", 1, '{"step": 2, "reward/mean": "<b>"}', "is no list of metrics"),
        ("metrics.jsonl", 1, '{"step": true}', "is no list of metrics"),
        ("metrics.jsonl", 1, '{"step": 1}', "row 2 has the step 1, expected one above 1; mend or remove the line"),
        ("metrics.jsonl", 1, "{}", "row 2 has the step None"),
        ("config.yaml", 0, "a: [", "is no YAML, expected the settings of a run"),
        ("exit.json", 0, "[]", "does not say how the run ended, expected code and reason"),
    ],
)
def test_corrupt_files(tmp_path: Path, file: str, line: int, text: str, said: str) -> None:
    path = write_run(tmp_path / "a", [0.1, 0.2]) / file
    spoil(path, line, text)
    with pytest.raises(DataError) as caught:
        one(tmp_path / "a")
    assert str(caught.value).startswith(f"{path}: {said}") and "\n" not in str(caught.value)


def test_what_is_no_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [0.1], code=3, reason="no weights")
    (folder / "metrics.jsonl").unlink()
    for runs, error, said in (
        (str(folder), DataError, "is not there, so the run has done no step; it ended with: no weights; leave it out"),
        (f"{tmp_path}/none", ConfigError, r"there is no run \(no .*/none/config.yaml\)"),
        (f"{tmp_path}/x*", ConfigError, r"runs=.*/x\*: matches no run"),
        (" ,", ConfigError, "runs: names no run"),
    ):
        with pytest.raises(PpojaxError, match=said) as caught:
            find_runs(runs)
        assert type(caught.value) is error
    (folder / "metrics.jsonl").write_text("")  # it began, and did no step: it is a run
    assert one(folder).steps == 0
    (folder / "config.yaml").write_text("- 1")
    with pytest.raises(DataError, match="holds no settings"):
        one(folder)


def make(folder: Path, *settings: dict, tasks: tuple[str, ...] = (), names: tuple[str, ...] = ()):
    runs = [one(write_run(folder / str(n), [0.5], settings=each)) for n, each in enumerate(settings)]
    return group(runs, tasks, names)


def test_seeds_are_one_method(tmp_path: Path) -> None:
    ppo = {"type": "ppo", "clip": 0.2}
    methods = make(tmp_path, config(), config(loss=ppo), config(seed=1), config(loss=ppo, seed=5, resume=True))
    assert [m.name for m in methods] == ["loss.type=dppo", "loss.type=ppo"]
    assert [[run.seed for run in m.runs] for m in methods] == [[0, 1], [0, 5]]
    [alone] = make(tmp_path / "alone", config(), config(seed=3))
    assert alone.name == "loss.type=dppo" and alone.tasks == (0, 0)


def test_names_say_what_differs(tmp_path: Path) -> None:
    wide = {"type": "dppo", "delta": 0.4}
    methods = make(
        tmp_path,
        config(),
        config(loss=wide, critic=None),
        config(loss={"type": "ppo", "clip": 0.2}, critic={"model": {"type": "cut", "layers": 6}}),
    )
    assert [m.name for m in methods] == [
        "critic=set, critic.model.layers=2, loss.type=dppo, loss.delta=0.2",
        "critic=null, loss.type=dppo, loss.delta=0.4",
        "critic=set, critic.model.layers=6, loss.type=ppo",
    ]
    named = make(tmp_path / "named", config(), config(loss=wide), names=("a", "b"))
    assert [m.name for m in named] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"names=a: expected 2 different names, for: loss.delta=0.2; loss.delta=0.4"):
        make(tmp_path / "bad", config(), config(loss=wide), names=("a",))


def test_tasks_are_strata(tmp_path: Path) -> None:
    hard = {"type": "calculator", "high": 99}
    settings = [config(), config(env=hard), config(env=hard, seed=1), config(env=hard, critic=None)]
    assert len(make(tmp_path / "a", *settings)) == 3
    methods = make(tmp_path / "b", *settings, tasks=("env",))
    assert [(m.name, m.tasks) for m in methods] == [("critic=set", (0, 1, 1)), ("critic=null", (1,))]
    with pytest.raises(ConfigError, match="tasks=enf: is no setting of the runs"):
        make(tmp_path / "c", *settings, tasks=("enf",))


def test_curves(tmp_path: Path) -> None:
    """Three runs, one of them ends early: the curve ends with it, and the others are drawn to their ends."""
    rows = {step: {"perf/total_num_tokens": 200.0} for step in (1, 2, 3)}
    for n, rewards in enumerate(([0.0, 0.3, 0.6, 0.9], [0.3, 0.3], [0.6, 0.6, 0.9])):
        settings = config(seed=n)
        write_run(
            tmp_path / str(n), rewards, settings=settings, rows=rows if n == 2 else None, success={0: 0.5, 2: 0.7}
        )
    [method] = group(find_runs(f"{tmp_path}/*"))
    curve = make_curve(method, "reward/mean", "step")
    assert curve is not None and curve.x.tolist() == [1, 2]
    np.testing.assert_allclose(curve.y, [0.3, 0.4])
    assert curve.low is not None and curve.low.tolist() == pytest.approx([0.0, 0.3])
    assert [len(x) for x, _ in curve.runs] == [4, 2, 3]
    by_tokens = make_curve(method, "reward/mean", "tokens")
    assert by_tokens is not None and by_tokens.x.tolist() == [200]  # where the third run begins, the second ends
    np.testing.assert_allclose(by_tokens.y, [(0.3 + 0.3 + 0.6) / 3])
    evaluated = make_curve(method, "val/success", "step")
    assert (
        evaluated is not None and evaluated.x.tolist() == [0, 2] and evaluated.y.tolist() == pytest.approx([0.5, 0.7])
    )
    assert make_curve(method, "critic/value_std", "step") is None


def test_long_curves_are_thinned() -> None:
    x, y = thin(np.arange(600.0), np.arange(600.0) * 2)
    assert len(x) == POINTS and x[0] == 2.0 and y[-1] == 2 * 597


def test_critics(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [0.5])
    assert judge(one(folder), 3) is None
    for step in (1, 2):
        write_values(folder, step, critics=2)
    seen = judge(one(folder), 1)
    assert seen is not None and seen.steps == 1 and seen.spread is not None
    assert seen.returns.tolist() == [0.25, 0.5, 1.0, 0.0]  # what failed is not there
    np.testing.assert_allclose(seen.values, [0.05, 0.55, 1.05, 0.55], atol=1e-6)
    np.testing.assert_allclose(seen.spread, 0.05, atol=1e-6)
    assert seen.part.tolist() == [0, 2, 0, 0]  # of five: first and second of two actions, the only one of a row twice
    both = judge(one(folder), 9)
    assert both is not None and both.steps == 2 and len(both.values) == 8
    place, error = both.disagreement()
    assert len(place) == 1 and error[0] == pytest.approx(
        np.sqrt(np.mean([0.2**2, 0.05**2, 0.05**2, 0.55**2])), abs=1e-5
    )
    write_values(folder, 3, critics=0)
    assert judge(one(folder), 1) is None


def test_critics_by_part_and_value() -> None:
    values = np.repeat([0.0, 1.0], 50)
    returns = np.where(np.arange(100) % 2 == 0, values, 1 - values)  # right half of the time
    part = np.arange(100) % 2
    seen = Judged(returns, values, None, part, 1)
    by_part = seen.by_part()
    assert by_part[0] == 1.0 and by_part[1] == pytest.approx(-3.0) and np.isnan(by_part[2:]).all()
    assert [x.tolist() for x in seen.calibration()] == [[0, 1], [0.5, 0.5]]
    many = Judged(np.arange(80.0) * 2, np.arange(80.0), None, part[:80], 1)
    x, y = many.calibration()
    assert len(x) == BINS and (y == 2 * x).all()
    assert to_go(np.array([0.0, 1.0, 0.0, 4.0]), 0.5).tolist() == [1.0, 2.0, 2.0, 4.0]
