"""Batches of which too much fails: dropped, played again with other tasks, and given up after a few."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import pytest

from ppojax.envs import Task
from ppojax.errors import DataError
from ppojax.rollout.settings import RolloutConfig
from ppojax.trainer import playing
from ppojax.trainer.playing import play_batch
from ppojax.types import Ending, Rollout, Row

KEY = jax.random.key(0)


def row(number: int, error: str | None) -> Row:
    nothing = np.zeros(1)
    info = {} if error is None else {"error": error, "error_text": f"it is {error}"}
    ending = Ending.TERMINATED if error is None else Ending.ERROR
    return Row(nothing, nothing, nothing, nothing, number, number, 0, ending, info=info)


class Played:
    """Plays batches as they are listed: the error of each episode, None where it is fine."""

    def __init__(self, *batches: Sequence[str | None]) -> None:
        self.batches, self.tasks, self.keys = list(batches), [], []

    def __call__(self, tasks: Sequence[Task], key: jax.Array) -> Rollout:
        self.tasks += tasks
        self.keys.append(jax.random.key_data(key).tolist())
        return Rollout(tuple(row(n, error) for n, error in enumerate(self.batches.pop(0))), {"x": 1.0})


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(playing.time, "sleep", slept.append)
    return slept


def play(played: Played, **limits: float) -> Rollout:
    tasks = iter([[Task(str(n), {})] for n in range(9)])
    return play_batch(played, tasks, KEY, RolloutConfig(**limits))  # type: ignore[arg-type]


def test_a_few_failures_are_let_pass(naps: list[float]) -> None:
    played = Played(["OSError", None, None, None, None])
    rollout = play(played)
    assert rollout.metrics == {"x": 1.0} and len(played.tasks) == 1 and naps == []
    assert played.keys == [jax.random.key_data(KEY).tolist()]
    long = ["LongPrompt"] * 9 + [None]  # the policy for them is another setting
    assert len(play(Played(long)).rows) == 10
    assert len(play(Played(["OSError"] * 3), max_failed=1.0).rows) == 3


def test_too_many_failures_drop_the_batch(naps: list[float]) -> None:
    played = Played(["OSError", None, None, None], ["OSError"] * 4, [None] * 4)
    rollout = play(played)
    assert rollout.metrics == {"x": 1.0, "error/batches_dropped": 2.0} and naps == [1.0, 2.0]
    assert [task.id for task in played.tasks] == ["0", "1", "2"] and len(set(map(tuple, played.keys))) == 3


def test_a_run_whose_batches_keep_failing_ends(naps: list[float]) -> None:
    with pytest.raises(DataError) as caught:
        play(Played(*[["OSError", "OSError", "ValueError", None]] * 2), retries=1)
    assert str(caught.value) == (
        "rollout: too much failed 2 times in a row, the last time 75% of the episodes (OSError 2, ValueError 1; the "
        "first: it is OSError), rollout.max_failed allows 20%: mend the environment or the reward, or raise "
        "rollout.max_failed"
    )
    assert naps == [1.0]


def test_an_episode_of_several_rows_counts_once() -> None:
    """Four rows of two episodes, of which one failed."""
    rows = [*[row(0, "OSError")] * 3, row(1, None)]
    tasks = iter([[Task("t", {})]])
    play_batch(lambda t, k: Rollout(tuple(rows)), tasks, KEY, RolloutConfig(max_failed=0.5))
    with pytest.raises(DataError, match="1 times in a row, the last time 50% of the episodes"):
        play_batch(lambda t, k: Rollout(tuple(rows)), iter([[]]), KEY, RolloutConfig(max_failed=0.4, retries=0))
