"""Rows handed from process to process."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.envs import Task
from ppojax.rollout import together
from ppojax.rollout.together import decode, encode
from ppojax.types import Ending, Recorded, Rollout, Row


def row(group: int, length: int = 3, **more: object) -> Row:
    action = np.arange(length) > 0
    plain = Row(
        np.arange(length, dtype=np.int32),
        action,
        np.where(action, np.float32(-0.1), np.float32(0)),
        np.zeros(length, np.float32),
        group=group,
        episode=group,
        segment=0,
        ending=Ending.TRUNCATED,
        messages=[{"role": "user", "content": "2+2 \u00e9"}],
        info={"success": np.bool_(True), "reward/exact": np.float32(0.5), "error": None},
    )
    return replace(plain, **more)


def test_rows_come_back_as_they_were() -> None:
    hidden = np.asarray(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3))
    kept = Recorded(top_id=np.ones((2, 4), np.int32), top_logp=np.zeros((2, 4), np.float32), hidden=hidden)
    rows = (row(0, recorded=kept, hint=np.array([7], np.int32)), row(1, 5, clipped=True, ending=Ending.ERROR))
    rows = (*rows, row(2, routed=np.full((3, 2, 1), -1, np.int16), segment=4))
    found = decode(encode(Rollout(rows, {"error/frac": 0.5})))
    assert found.metrics == {"error/frac": 0.5}
    for before, after in zip(rows, found.rows, strict=True):
        for name, value in vars(before).items():
            if name == "info":
                assert after.info == {"success": True, "reward/exact": 0.5, "error": None}
            elif name == "recorded":
                for old, new in zip(before.recorded, after.recorded, strict=True):
                    assert (old is None and new is None) or (old.dtype == new.dtype and np.array_equal(old, new))
            elif isinstance(value, np.ndarray):
                assert vars(after)[name].dtype == value.dtype and np.array_equal(vars(after)[name], value)
            else:
                assert vars(after)[name] == value and type(vars(after)[name]) is type(value)
    assert decode(encode(Rollout((), {}))) == Rollout((), {})


@pytest.mark.parametrize(("tasks", "shares"), [(5, [(0, 1), (1, 2), (3, 2)]), (2, [(0, 0), (0, 1), (1, 1)])])
def test_tasks_are_dealt_out_in_order(
    tasks: int, shares: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(mine: list[Task], first: int) -> Rollout:
        assert mine == every[first : first + len(mine)]
        metrics = {"error/Hang": 1.0, "timing_s/gen": float(first), "perf/slot_use": float(len(mine))}
        return Rollout(tuple(row(first + i) for i in range(len(mine))), metrics)

    every, found = [Task(str(i), {}) for i in range(tasks)], []
    monkeypatch.setattr(together.jax, "process_count", lambda: 3)
    everyone = [encode(play(every[first : first + n], first)) for first, n in shares]
    for index in range(3):
        monkeypatch.setattr(together.jax, "process_index", lambda index=index: index)

        def gather(data: bytes, index: int = index) -> list[bytes]:
            assert data == everyone[index]
            return everyone

        monkeypatch.setattr(together, "gather", gather)
        found.append(together.together(play, every))
    for rollout in found:
        assert [row.group for row in rollout.rows] == list(range(tasks))
        assert rollout.metrics["error/Hang"] == 3
        assert rollout.metrics["timing_s/gen"] == shares[-1][0]
        assert rollout.metrics["perf/slot_use"] == pytest.approx(tasks / 3)
