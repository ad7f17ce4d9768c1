"""Dynamic sampling: which groups are kept, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pytest

from ppojax.rollout.dynamic import choose, count_varied
from ppojax.types import Ending, Rollout, Row


def rollout_of(
    groups: Sequence[Sequence[float]], segments: int = 1, metrics: Mapping[str, float] = MappingProxyType({})
) -> Rollout:
    """Episodes that earn so much, each in so many rows, all of it in the last one."""
    rows, number = [], 0
    for g, earned in enumerate(groups):
        for reward in earned:
            for s in range(segments):
                paid = np.asarray([0, reward if s + 1 == segments else 0], np.float32)
                mark = np.asarray([g, number], np.int32)
                ending = Ending.ERROR if np.isnan(reward) else Ending.TERMINATED
                rows.append(Row(mark, np.asarray([False, True]), paid, np.nan_to_num(paid), g, number, s, ending))
            number += 1
    return Rollout(tuple(rows), dict(metrics))


def test_groups_that_differ_come_first() -> None:
    first = rollout_of(
        [[0, 0], [0, 1], [1, 1]],
        metrics={"error/OSError": 1.0, "timing_s/gen": 2.0, "perf/slot_use": 0.5, "data/prompts_cut": 1.0},
    )
    second = rollout_of(
        [[1, 0], [0, 0], [0.5, 1]],
        metrics={"error/OSError": 2.0, "timing_s/gen": 3.0, "perf/slot_use": 1.0, "data/prompts_cut": 2.0},
    )
    assert (count_varied([first]), count_varied([first, second])) == (1, 3)
    got = choose([first, second], 3)
    assert [row.token[0] for row in got.rows] == [1, 1, 0, 0, 2, 2]
    assert [row.group for row in got.rows] == [0, 0, 1, 1, 2, 2]
    assert [row.episode for row in got.rows] == list(range(6))
    assert got.metrics == {
        "error/OSError": 3.0,
        "data/prompts_cut": 3.0,
        "timing_s/gen": 5.0,
        "perf/slot_use": 0.75,
        "dynamic/rounds": 2.0,
        "dynamic/kept_frac": 0.5,
    }
    assert [row.token[0] for row in choose([first, second], 2).rows] == [1, 1, 0, 0]  # what is too much is left out


def test_groups_that_do_not_differ_fill_up() -> None:
    """Shapes stay: a step without enough of them takes the others, in order."""
    got = choose([rollout_of([[0, 0], [0, 1], [1, 1]])], 3)
    assert [row.token[0] for row in got.rows] == [1, 1, 0, 0, 2, 2]


def test_episodes_of_several_rows_count_once() -> None:
    got = choose([rollout_of([[1, 1], [0, 1]], segments=3)], 1)
    assert [row.token[0] for row in got.rows] == [1] * 6
    assert [row.episode for row in got.rows] == [0] * 3 + [1] * 3 and [row.segment for row in got.rows] == [0, 1, 2] * 2


@pytest.mark.parametrize("groups", [[[np.nan, 1.0]], [[np.nan, np.nan]], [[0.5, 0.5]]])
def test_failed_episodes_make_no_difference(groups: list[list[float]]) -> None:
    assert count_varied([rollout_of(groups)]) == 0
