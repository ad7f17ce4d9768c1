"""Group advantages, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from segments import Segment, batch_of, random_rows

from ppojax.advantages import Group
from small_batch import experience_of


def rows(returns, group, valid=None, **kwargs):
    """Rows of two action tokens around an observation; the return is split over both."""
    reward = [[0.25 * r, 0, 0.75 * r, 0] for r in returns]
    return experience_of([[1, 0, 1, 0]] * len(returns), reward=reward, group=group, valid=valid, **kwargs)


def per_row(out) -> np.ndarray:
    np.testing.assert_array_equal(out.advantage_BT[:, [1, 3]], 0)
    np.testing.assert_array_equal(out.advantage_BT[:, 0], out.advantage_BT[:, 2])
    assert out.return_MBT is None
    return np.asarray(out.advantage_BT[:, 0])


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        # Group 7: returns 0, 1, 0.5 (mean 0.5, deviation 0.5). Group 3: 1, 0 (mean 0.5, deviation sqrt(0.5)).
        ("mean", "none", [-0.5, 0.5, 0.5, 0, -0.5]),
        ("mean", "std", [-1, 0.5 / np.sqrt(0.5), 1, 0, -0.5 / np.sqrt(0.5)]),
        ("leave_one_out", "none", [-0.75, 1, 0.75, 0, -1]),
        ("leave_one_out", "std", [-1.5, 1 / np.sqrt(0.5), 1.5, 0, -1 / np.sqrt(0.5)]),
        ("none", "none", [0, 1, 1, 0.5, 0]),
    ],
)
def test_ragged_groups(baseline, scale, expected):
    e = rows([0, 1, 1, 0.5, 0], [7, 3, 7, 7, 3])
    out = jax.jit(Group(baseline=baseline, scale=scale).__call__)(e)
    # epsilon = 1e-6 beside deviations above 0.5
    np.testing.assert_allclose(per_row(out), expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("common", [0.0, 0.1, 1 / 3, 1e6])
def test_equal_returns_give_exactly_zero(baseline, scale, common):
    """Three times 0.1 has a float32 mean that is not 0.1; nothing of that may be scaled up."""
    out = Group(baseline=baseline, scale=scale, epsilon=0.0)(rows([common] * 3 + [0.5], [1, 1, 1, 2]))
    np.testing.assert_array_equal(per_row(out), 0)


def test_failed_rows_leave_the_statistics():
    """A failed row has no action tokens, and its rewards, here NaN and 100, count for nothing."""
    e = rows([0, 1, 100, 1, np.nan], [0, 0, 0, 5, 5], valid=[True, True, False, True, False])
    e = e._replace(action_BT=e.action_BT & e.valid_B[:, None])
    out = Group(scale="none")(e)
    np.testing.assert_allclose(per_row(out), [-0.5, 0.5, 0, 0, 0], rtol=1e-6)


def test_group_ids_may_be_any_integers():
    small = Group()(rows([0, 1, 0, 3], [0, 0, 1, 1]))
    large = Group()(rows([0, 1, 0, 3], [2_000_000_000, 2_000_000_000, -4, -4]))
    np.testing.assert_array_equal(small.advantage_BT, large.advantage_BT)


def test_fractional_rewards_survive():
    out = Group(scale="none")(rows([0.0, 0.0625], [0, 0]))
    assert out.advantage_BT.dtype == jnp.float32
    np.testing.assert_array_equal(per_row(out), np.float32([-0.03125, 0.03125]))


def test_all_rows_failed():
    e = rows([1, 2], [0, 0], valid=[False, False])
    np.testing.assert_array_equal(per_row(Group()(e)), 0)


VARIANTS = [Group(baseline=b, scale=s) for b in ("mean", "leave_one_out") for s in ("std", "none")]


@pytest.fixture(scope="module")
def every_variant():
    return jax.jit(lambda e: [group(e).advantage_BT for group in VARIANTS])


def by_hand(group: Group, rows: list[Segment], groups: list[int]) -> list[float]:
    """Float64, episode by episode: the advantage of each row's actions."""
    returns: dict[int, dict[int, float]] = {}
    for row, g in zip(rows, groups, strict=True):
        if row.valid:
            episodes = returns.setdefault(g, {})
            episodes[row.episode] = episodes.get(row.episode, 0.0) + float(row.reward.sum())
    out = []
    for row, g in zip(rows, groups, strict=True):
        R = list(returns.get(g, {}).values())
        if not row.valid or len(R) < 2 or max(R) == min(R):
            out.append(0.0)
            continue
        own = returns[g][row.episode]
        A = own - (np.mean(R) if group.baseline == "mean" else (sum(R) - own) / (len(R) - 1))
        out.append(A / (np.std(R, ddof=1) + group.epsilon) if group.scale == "std" else A)
    return out


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_an_episode_of_several_rows_counts_once(every_variant, seed):
    """Chains of ragged length in ragged groups, in any order: rewards add up over rows, and all rows get the same."""
    rows = random_rows(seed)
    for row in rows:
        row.reward = np.round(row.reward)
    groups = [row.episode % 3 for row in rows]
    e = batch_of(rows)
    e = e._replace(group_B=jnp.asarray(groups + [99] * (len(e.group_B) - len(rows)), jnp.int32))
    for group, advantage_BT in zip(VARIANTS, every_variant(e), strict=True):
        for b, (row, expected) in enumerate(zip(rows, by_hand(group, rows, groups), strict=True)):
            n = len(row.action)
            # float32 sums of a few whole numbers, a root and a division
            np.testing.assert_allclose(advantage_BT[b, :n], np.where(row.action, expected, 0), rtol=2e-6, atol=2e-6)


def test_rows_of_an_episode_have_the_same_advantage_to_the_bit(every_variant):
    rows = random_rows(3)
    e = batch_of(rows)._replace(group_B=jnp.zeros(12, jnp.int32))
    for advantage_BT in every_variant(e):
        for episode in {row.episode for row in rows}:
            mine = [advantage_BT[b, : len(r.action)][r.action] for b, r in enumerate(rows) if r.episode == episode]
            assert len(set(np.concatenate(mine).tolist())) <= 1


# --- without a group, to go, whitened ------------------------------------------------------------------------------

PLUS_PLUS = [
    Group(baseline=baseline, scale="none", rewards=rewards, whiten=whiten)
    for baseline, rewards, whiten in (
        ("none", "to_go", "off"),
        ("none", "to_go", "batch"),  # REINFORCE++
        ("mean", "episode", "batch"),  # its variant for groups, in verl
        ("mean", "to_go", "batch"),  # and in OpenRLHF
        ("leave_one_out", "to_go", "off"),
    )
]


def by_token(group: Group, rows: list[Segment], groups: list[int], shape: tuple[int, int]) -> np.ndarray:
    """Float64, token by token."""
    out, mask = np.zeros(shape), np.zeros(shape, bool)
    whole = [sum(r.reward.sum() for r in rows if r.valid and r.episode == row.episode) for row in rows]
    plain = Group(baseline=group.baseline, scale="none")
    compared = whole if group.baseline == "none" else by_hand(plain, rows, groups)
    for b, row in enumerate(rows):
        n = len(row.action)
        mask[b, :n] = row.action & row.valid
        before = sum(r.reward.sum() for r in rows if r.valid and r.episode == row.episode and r.segment < row.segment)
        past = before + np.cumsum(row.reward) - row.reward
        out[b, :n] = compared[b] - (past if group.rewards == "to_go" else 0)
    if group.whiten == "batch" and mask.any():
        out = (out - out[mask].mean()) / max(out[mask].std(), group.whiten_floor)
    return np.where(mask, out, 0)


def test_rewards_to_go_and_whitening_over_chains():
    run = jax.jit(lambda e: [group(e).advantage_BT for group in PLUS_PLUS])
    for seed in range(8):
        chains = random_rows(seed)
        groups = [row.episode % 3 for row in chains]
        e = batch_of(chains)
        e = e._replace(group_B=jnp.asarray(groups + [99] * (len(e.group_B) - len(chains)), jnp.int32))
        for group, advantage_BT in zip(PLUS_PLUS, run(e), strict=True):
            # float32 sums of at most 28 rewards of order 1, and two passes over the batch
            np.testing.assert_allclose(
                advantage_BT, by_token(group, chains, groups, advantage_BT.shape), rtol=1e-5, atol=2e-6
            )


def test_equal_returns_stay_where_nothing_is_compared():
    """REINFORCE learns from a group of one and from equal returns; whitening takes what all tokens have in common."""
    e = rows([0.5, 0.5, 0.5], [1, 1, 2])
    np.testing.assert_array_equal(per_row(Group(baseline="none", scale="none")(e)), 0.5)
    np.testing.assert_array_equal(per_row(Group(baseline="none", scale="none", whiten="batch")(e)), 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"baseline": "none"}, "scale=std needs a group"), ({"rewards": "to_go"}, "scale=std is of whole episodes")],
)
def test_a_deviation_needs_whole_returns_of_a_group(kwargs, message):
    with pytest.raises(ValidationError, match=message):
        Group(**kwargs)
