"""The task stream: each task once an epoch, in an order of its own, and resumed exactly."""

from __future__ import annotations

import json

import pytest

from ppojax.envs import Task
from ppojax.rollout.tasks import task_stream

TASKS = [Task(str(n), {"n": n}) for n in range(12)]


def ids(batch: list[Task]) -> list[int]:
    return [task.data["n"] for task in batch]


def test_each_epoch_has_each_task_once_in_another_order() -> None:
    stream = task_stream(TASKS, 4, 0)
    epochs = [[n for _ in range(3) for n in ids(next(stream))] for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_shuffle_differently() -> None:
    orders = {tuple(ids(next(task_stream(TASKS, 12, seed)))) for seed in range(4)}
    assert len(orders) == 4
    assert ids(next(task_stream(TASKS, 12, 0))) == ids(next(task_stream(TASKS, 12, 0)))


@pytest.mark.parametrize("prompts", [4, 5])
@pytest.mark.parametrize("done", [0, 1, 3, 7])
def test_it_goes_on_where_it_was(prompts: int, done: int) -> None:
    """From any position, in the middle of an epoch or across its end, through JSON."""
    stream = task_stream(TASKS, prompts, 3)
    for _ in range(done):
        next(stream)
    position = json.loads(json.dumps(stream.get_state()))
    want = [ids(next(stream)) for _ in range(6)]
    resumed = task_stream(TASKS, prompts, 3)
    resumed.set_state(position)
    assert [ids(next(resumed)) for _ in range(6)] == want
