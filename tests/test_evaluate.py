"""`python -m ppojax.evaluate`: its two estimates against published and counted numbers, and the command on a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import jax
import numpy as np
import pytest

from ppojax import evaluate
from ppojax.cli import run_command
from ppojax.config import Config
from ppojax.envs import Task
from ppojax.evaluate import EvaluateConfig
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.rundir import RunDir
from ppojax.trainer import Trainer, held_out
from ppojax.trainer.evaluation import pass_at_k, wilson

MINIMAL = (
    "env.type=calculator",
    "model.fresh={layers: 1, width: 16, heads: 2, kv_heads: 2, ffn: 32}",
    "model.tokenizer=char",
    "critic.model.layers=1",
    "rollout.prompts=2",
    "rollout.group_size=2",
    "rollout.max_turn_tokens=4",
    "rollout.max_tokens=128",
    "update.microbatch_rows=4",
    "loss.entropy_coefficient=0.1",  # moves the policy although it earns nothing
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)  # four digits are published
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_of_no_trials_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_success(k: int) -> None:
    correct, samples = (0, 1, 3, 5), 5
    shares = []
    for c in correct:
        draws = list(combinations([True] * c + [False] * (samples - c), k))
        shares.append(sum(map(any, draws)) / len(draws))
    assert pass_at_k(correct, samples, k) == pytest.approx(np.mean(shares), abs=1e-12)


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer's power
        trainer = Trainer(Config.load(*MINIMAL, "steps=2"))
        trainer.step()
        yield trainer


@pytest.fixture
def run(trainer: Trainer, tmp_path: Path) -> RunDir:
    """A run as a training of one step leaves it."""
    run = RunDir(tmp_path / "run")
    run.create()
    run.write_config(trainer.config.to_yaml())
    with Checkpoints(run.checkpoints, trainer.config.checkpoint) as checkpoints:
        checkpoints.save(trainer.number, trainer.state(), trainer.position())
    return run


def command(*arguments: str) -> int:
    return run_command(evaluate.main, arguments, EvaluateConfig)


def test_the_command_leaves_a_table_and_a_record(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.path.rglob("*"))
    assert command(f"run={run.path}", "prompts=3", "samples=3") == 0
    assert "greedy success" in capsys.readouterr().out
    assert sorted(set(run.path.rglob("*")) - set(before)) == [run.path / "evaluation.json"]
    record = json.loads((run.path / "evaluation.json").read_text())
    metrics = record.pop("metrics")
    assert record == {"checkpoint": 1, "prompts": 3, "samples": 3, "seed": 0, "temperature": 1.0}
    assert set(metrics) == {
        *("val/success", "val/success_low", "val/success_high", "val/reward/mean", "val/tasks", "val/error_frac"),
        *("val/pass@1", "val/pass@2"),
    }
    assert metrics["val/tasks"] == 3
    assert (metrics["val/success_low"], metrics["val/success_high"]) == wilson(round(3 * metrics["val/success"]), 3)


def test_it_is_the_checkpoints_policy_on_the_runs_held_out_tasks(
    run: RunDir, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict, Sequence[Task]]] = []

    def spy(collector: object, params: dict, tasks: Sequence[Task], key: jax.Array) -> tuple[dict, list]:
        seen.append((params, tasks))
        return {"val/success": 0.0, "val/success_low": 0.0, "val/success_high": 1.0, "val/reward/mean": 0.0}, []

    monkeypatch.setattr(held_out, "evaluate_greedy", spy)
    assert command(f"run={run.path}", "prompts=3", "samples=1", "checkpoint=1") == 0
    [(params, tasks)] = seen
    jax.tree.map(np.testing.assert_array_equal, params, trainer.states.actor.params)
    untrained = Trainer(trainer.config).states.actor.params
    assert not np.array_equal(params["embed"], untrained["embed"])
    assert list(tasks) == list(trainer.config.env.tasks("eval", trainer.config.seed)[:3])


def test_there_must_be_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"run={tmp_path}/none") == 2
    expected = f"run={tmp_path}/none: there is no run (no {tmp_path}/none/config.yaml); give the folder of one\n"
    assert capsys.readouterr().err == f"ppojax: error: {expected}"


def test_there_must_be_enough_tasks(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"run={run.path}", "prompts=257", "--dry-run") == 2
    assert "prompts=257: the run's environment has 256 held-out tasks; ask for 256 or fewer" in capsys.readouterr().err
    assert command(f"run={run.path}", "prompts=256", "--dry-run") == 0


def test_there_must_be_a_checkpoint(trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    run.write_config(trainer.config.to_yaml())
    assert command(f"run={tmp_path}") == 3
    assert f"{tmp_path}/checkpoints: the run has no checkpoint; one is written when it ends" in capsys.readouterr().err
    assert not run.checkpoints.exists()


def test_it_must_be_the_checkpoint_asked_for(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"run={run.path}", "checkpoint=7") == 3
    assert f"checkpoint=7: {run.checkpoints} has none of that step; the newest is 1" in capsys.readouterr().err
