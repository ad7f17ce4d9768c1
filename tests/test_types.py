"""The few functions of the types."""

from __future__ import annotations

import numpy as np

from ppojax.types import Ending, Rollout, Row


def test_rows_come_episode_by_episode() -> None:
    nothing = np.zeros(0, np.float32)
    places = [(2, 1), (0, 0), (2, 0), (1, 0), (2, 2)]
    rows = [Row(nothing, nothing, nothing, nothing, 0, e, s, Ending.CUT) for e, s in places]
    found = Rollout(tuple(rows)).episodes()
    assert [[(row.episode, row.segment) for row in rows] for rows in found] == [
        [(0, 0)],
        [(1, 0)],
        [(2, 0), (2, 1), (2, 2)],
    ]
    assert Rollout(()).episodes() == []
