"""Evaluations count episodes, however many rows they have."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ppojax.rollout.collect import Collector
from ppojax.trainer.evaluation import evaluate_greedy, evaluate_samples, pass_at_k, wilson
from ppojax.types import Ending, Rollout, Row
from tiny_model import collector_of


def rows_of(episode: int, rewards: list[float], success: bool, failed: bool = False) -> list[Row]:
    """An episode cut into one row a reward; only its last row says how it went."""
    rows = []
    for segment, reward in enumerate(rewards):
        last = segment == len(rewards) - 1
        ending, info = (Ending.TERMINATED, {"success": success}) if last else (Ending.CUT, {})
        ending = Ending.ERROR if failed else ending
        token, earned = np.zeros(1, np.int32), np.array([reward], np.float32)
        rows.append(
            Row(token, np.ones(1, bool), np.zeros(1, np.float32), earned, 0, episode, segment, ending, info=info)
        )
    return rows


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four episodes of 3, 1, 2 and 2 rows, of which the first and the last succeed, however they are played."""
    episodes = [rows_of(0, [0, 0.5, 1], True), rows_of(1, [0.5], False)]
    episodes += [rows_of(2, [9, 9], True, failed=True), rows_of(3, [0, 1], True)]
    rollout = Rollout(tuple(row for rows in episodes for row in rows))
    monkeypatch.setattr(Collector, "__call__", lambda self, params, tasks, key: rollout)


@pytest.mark.usefixtures("played")
def test_greedy_counts_episodes() -> None:
    metrics, _ = evaluate_greedy(collector_of(), {}, [], jax.random.key(0))
    low, high = wilson(2, 4)
    assert metrics == {
        "val/success": 0.5,
        "val/success_low": low,
        "val/success_high": high,
        "val/reward/mean": 0.75,
        "val/tasks": 4.0,
        "val/error_frac": 0.25,
    }


@pytest.mark.usefixtures("played")
def test_samples_are_episodes() -> None:
    metrics = evaluate_samples(collector_of(), {}, [], jax.random.key(0), samples=2)
    assert metrics == {"val/pass@1": pass_at_k([1, 1], 2, 1), "val/pass@2": 1.0}
