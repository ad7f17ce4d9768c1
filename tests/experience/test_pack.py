"""Packing: rows come out of the arrays as they went in."""

from __future__ import annotations

from math import log2

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import random_rows
from ppojax.experience.pack import bucketed, layout_of, pack
from ppojax.mesh import MeshConfig
from ppojax.types import Ending, Experience, Layout, Row
from tiny_model import bits

MESH = MeshConfig().build()


def unpacked(experience: Experience, b: int) -> dict[str, np.ndarray]:
    """One row of the arrays, cut to its length."""
    n = int(experience.length_B[b])
    index = np.asarray(experience.action_index_BA[b])
    mask = np.zeros(n, bool)
    mask[index[index > 0]] = True
    return {
        "token": np.asarray(experience.token_BT[b, :n]),
        "action": np.asarray(experience.action_BT[b, :n]),
        "indexed": mask,
        "logp": bits(experience.logp_behavior_BT[b, :n]),
        "reward": bits(experience.reward_BT[b, :n]),
    }


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.integers(1, 4),
    group=st.sampled_from([1, 2, 3]),
    spare=st.integers(0, 3),
    bucket=st.sampled_from([1, 4, 7, 32]),
    share=st.booleans(),
    failed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rows_survive(prompts: int, group: int, spare: int, bucket: int, share: bool, failed: bool, seed: int) -> None:
    rows = random_rows(prompts, group, seed)
    if failed:
        rows[-1] = Row(**{**vars(rows[-1]), "ending": Ending.ERROR})
    layout = layout_of(rows, group=group if share else 1, prompt_bucket=4)
    packed = pack(rows, batch=len(rows) + spare, bucket=bucket, actions=9, mesh=MESH, layout=layout)
    experience = jax.device_get(packed)
    B, T = experience.token_BT.shape
    assert len(rows) + spare == B and (T - layout.prefix) % bucket == 0
    assert not np.asarray(experience.action_BT[:, -1]).any()  # room for the value of the last state
    for b, row in enumerate(rows):
        counts = row.ending != Ending.ERROR
        got = unpacked(experience, b)
        np.testing.assert_array_equal(got["token"], row.token)
        np.testing.assert_array_equal(got["action"], row.action & counts)
        np.testing.assert_array_equal(got["indexed"], row.action & counts)
        np.testing.assert_array_equal(got["logp"], bits(row.logp_behavior) if counts else 0)
        np.testing.assert_array_equal(got["reward"], bits(row.reward))
        names = ("length_B", "prefix_B", "ending_B", "valid_B", "group_B", "episode_B", "segment_B")
        want = (len(row.token), row.action.argmax(), row.ending, counts, row.group, row.episode, row.segment)
        assert tuple(int(getattr(experience, name)[b]) for name in names) == want
        assert not np.asarray(experience.action_BT[b, len(row.token) :]).any()
    for b in range(len(rows), B):
        assert not experience.valid_B[b] and not np.asarray(experience.action_BT[b]).any()
        assert int(experience.episode_B[b]) == -1 and int(experience.length_B[b]) == 0


def test_what_is_shared() -> None:
    rows = random_rows(2, 3)
    longest = max(int(row.action.argmax()) for row in rows)
    assert layout_of(rows, group=3, prompt_bucket=4) == Layout(3, -(-longest // 4) * 4)
    assert layout_of(rows, group=1, prompt_bucket=4) == Layout()
    assert layout_of(rows[:-1], group=3, prompt_bucket=4) == Layout()  # a group that is not whole
    assert layout_of(rows[1:] + rows[:1], group=3, prompt_bucket=4) == Layout()  # groups of another prompt
    changed = rows[4].token.copy()
    changed[0] += 1
    other = [*rows[:4], Row(**{**vars(rows[4]), "token": changed}), rows[5]]
    assert layout_of(other, group=3, prompt_bucket=4) == Layout()


def test_a_row_that_failed_before_its_first_action_shares_its_group_s_prompt() -> None:
    rows = random_rows(2, 3)
    n = int(rows[3].action.argmax())
    columns = {name: vars(rows[4])[name][:n] for name in ("token", "action", "logp_behavior", "reward")}
    failed = Row(**{**vars(rows[4]), **columns, "ending": Ending.ERROR})
    rows = [*rows[:4], failed, rows[5]]
    layout = layout_of(rows, group=3, prompt_bucket=4)
    assert layout == Layout(3, -(-max(int(row.action.argmax()) for row in rows) // 4) * 4)
    experience = pack(rows, batch=6, bucket=8, actions=9, mesh=MESH, layout=layout)
    assert experience.prefix_B[4] == n and not experience.valid_B[4]


@pytest.mark.parametrize("share", [False, True])
def test_what_follows_the_last_token_has_a_place(share: bool) -> None:
    """A row that fills its bucket exactly gets another one."""
    rows = random_rows(1, 2)
    layout = layout_of(rows, group=2 if share else 1, prompt_bucket=1)
    longest = max(len(row.token) for row in rows)
    after = longest - layout.prefix
    for bucket, parts in ((after, 2), (after + 1, 1)):
        experience = pack(rows, batch=2, bucket=bucket, actions=9, mesh=MESH, layout=layout)
        assert experience.token_BT.shape[1] == layout.prefix + parts * bucket


def test_action_positions_fill_up_with_zero() -> None:
    rows = random_rows(1, 2)
    experience = pack(rows, batch=2, bucket=8, actions=40, mesh=MESH)
    index_BA = np.asarray(experience.action_index_BA)
    assert index_BA.shape[1] == experience.token_BT.shape[1]  # never more than there are positions
    for b, row in enumerate(rows):
        where = np.flatnonzero(row.action)
        np.testing.assert_array_equal(index_BA[b], [*where, *[0] * (index_BA.shape[1] - len(where))])


def test_sizes_are_few() -> None:
    assert [bucketed(n, 4) for n in (0, 1, 4, 5, 17, 29, 32, 33, 41, 64, 65)] == [
        0,
        4,
        4,
        8,
        20,
        32,
        32,
        40,
        48,
        64,
        80,
    ]
    assert [bucketed(n, 1, steps=2) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [bucketed(n, 4, most=37) for n in (12, 33, 37)] == [12, 40, 40]
    for most in (7, 100, 1000, 100_000):
        sizes = {n: bucketed(n, 8, most) for n in range(1, most + 1)}
        assert all(n <= size < n + 8 or 4 * size < 5 * (n + 8) for n, size in sizes.items())
        assert len(set(sizes.values())) <= 4 * log2(max(most / 8, 2)) and sizes[most] == -(-most // 8) * 8


def test_shapes_are_few_whatever_the_lengths() -> None:
    """Random prompts and answers of up to 200 tokens: lengths are padded to a few sizes of each."""
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(200):
        longest = rng.integers(2, 100, 2)
        rows = []
        for group in range(2):
            prompt = rng.integers(1, 9, rng.integers(1, longest[0])).astype(np.int32)
            for n in range(2):
                said = rng.integers(1, 9, rng.integers(1, longest[1])).astype(np.int32)
                token, action = np.concatenate([prompt, said]), np.arange(len(prompt) + len(said)) >= len(prompt)
                zero = np.zeros(len(token), np.float32)
                rows.append(Row(token, action, zero, zero, group, 2 * group + n, 0, Ending.TERMINATED))
        layout = layout_of(rows, group=2, prompt_bucket=8, most=200)
        experience = pack(rows, batch=4, bucket=16, actions=100, mesh=MESH, layout=layout, most=200)
        shapes.add((layout, experience.token_BT.shape))
    assert len(shapes) <= 4 * log2(200 / 8) * 4 * log2(200 / 16)
