"""Episodes of several rows: every cut rule by hand, and against a plain loop over random chains."""

from __future__ import annotations

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import B, M, Segment, T, batch_of, join, loop, random_rows, random_segment

from ppojax.advantages import GAE
from ppojax.mesh import MeshConfig, shard_rows
from ppojax.types import Advantage, Ending, Experience

MASK_RULES, CUT_RULES = ("skip", "zero", "dense"), ("chain", "scale", "broadcast")
TRUNCATIONS = ("bootstrap", "zero", "mask_out")


def every(gamma: float, lambda_policy: float, lambda_value: float, **rules: tuple[str, ...]):
    """One program for all combinations of rules: a function from an experience to results by combination."""
    names = ("mask_rule", "cut_rule", "truncation")
    combinations = list(product(*(rules[name] for name in names)))
    kwargs = {"gamma": gamma, "lambda_policy": lambda_policy, "lambda_value": lambda_value}
    estimators = [GAE(**kwargs, **dict(zip(names, chosen, strict=True))) for chosen in combinations]
    program = jax.jit(lambda e: [estimator(e) for estimator in estimators])

    def run(e: Experience) -> dict[tuple[str, ...], Advantage]:
        return dict(zip(combinations, jax.device_get(program(e)), strict=True))

    return run


@pytest.fixture(scope="module")
def discounted():
    """All 27 combinations of rules, with gamma and lambdas below 1."""
    return every(0.9, 0.8, 0.6, mask_rule=MASK_RULES, cut_rule=CUT_RULES, truncation=TRUNCATIONS)


@pytest.fixture(scope="module")
def undiscounted():
    """The combinations without broadcast and mask_out, with gamma = lambda = 1."""
    return every(1.0, 1.0, 1.0, mask_rule=MASK_RULES, cut_rule=CUT_RULES[:2], truncation=TRUNCATIONS[:2])


# --- by hand -------------------------------------------------------------------------------------------------------

# Two segments: values .25 .5 | .75, a reward of .125 on the first action and of 1 on the last; gamma 1, lambda .5.
TWO = {
    "chain": ([0.125 + 0.25 + 0.5 * 0.375, 0.25 + 0.5 * 0.25], [0.25]),
    # The first segment alone ends with 1: .5 at its last action, times lambda for the one action that follows.
    "scale": ([0.5 * (0.125 + 0.25 + 0.5 * 0.5), 0.5 * 0.5], [0.25]),
    # The second ends with 1.125, of which .125 was earned before it.
    "broadcast": ([0.125 + 0.25 + 0.5 * 0.5, 0.5], [0.375]),
}
TWO_TARGETS = {
    "chain": ([1.125, 1], [1]),
    "scale": ([1.125, 1], [1]),
    "broadcast": ([1.125, 1], [1.125]),
}
# Three: values .5 1 | 2 | 1 4, rewards 1 on the second action and 8 on the last; gamma .5, lambda .5, so times .25.
# Chain, from the end: 8 - 4 = 4;  2 - 1 + .25 4 = 2;  .5 - 2 + .25 2 = -1;  1 + 1 - 1 + .25 -1 = .75;  .5 - .5 + ...
THREE = {
    "chain": ([0.1875, 0.75], [-1], [2, 4]),
    # 8 - 2 with two actions after it; 1 + 8 - 1 and .5 - .5 + .25 8 with three.
    "scale": ([2 / 64, 8 / 64], [6 / 16], [2, 4]),
    # 8 + 1 - 4 and 2 - 1 + .25 5 in the last; 9 - 2; as before, but not scaled.
    "broadcast": ([2, 8], [7], [2.25, 5]),
}
THREE_TARGETS = {
    "chain": ([1, 2], [2], [4, 8]),
    "scale": ([4.5, 9], [8], [4, 8]),
    "broadcast": ([4.5, 9], [9], [4.5, 9]),
}


def hand(values: list[list[float]], rewards: list[list[float]], gap: int) -> list[Segment]:
    """Segments of one critic's values at the actions, behind a prompt; an observation of `gap` tokens in the last."""
    rows = []
    for s, (value, reward) in enumerate(zip(values, rewards, strict=True)):
        last = s == len(values) - 1
        mask = [0, 0, *([1, *[0] * gap, 1] if last and len(value) == 2 else [1] * len(value))]
        action = np.array(mask, bool)
        v, r = np.full(len(mask) + 1, 100.0), np.zeros(len(mask))
        v[:-1][action], r[action] = value, reward
        rows.append(Segment(action, r, v[None], 7, s, Ending.TERMINATED if last else Ending.CUT))
    return rows


@pytest.mark.parametrize(
    ("rows", "gamma", "advantages", "targets"),
    [
        (hand([[0.25, 0.5], [0.75]], [[0.125, 0], [1]], 0), 1.0, TWO, TWO_TARGETS),
        (hand([[0.5, 1], [2], [1, 4]], [[0, 1], [0], [0, 8]], 2), 0.5, THREE, THREE_TARGETS),
    ],
)
def test_by_hand(rows, gamma, advantages, targets):
    """Exact: all numbers are sums of powers of two. Nothing has a gradient."""
    estimators = {rule: GAE(gamma=gamma, lambda_policy=0.5, cut_rule=rule) for rule in CUT_RULES}
    e = batch_of(rows[::-1], (4, 8))

    @jax.jit
    def run(value_MBT):
        out = {rule: estimator(e._replace(value_MBT=value_MBT)) for rule, estimator in estimators.items()}
        return sum(jnp.nansum(x) for x in jax.tree.leaves(out)), out

    gradient, out = jax.grad(run, has_aux=True)(e.value_MBT)
    np.testing.assert_array_equal(gradient, 0)
    for rule in CUT_RULES:
        for b, row in enumerate(rows[::-1]):
            n = len(row.action)
            np.testing.assert_array_equal(out[rule].advantage_BT[b, :n][row.action], advantages[rule][row.segment])
            np.testing.assert_array_equal(out[rule].return_MBT[0, b, :n][row.action], targets[rule][row.segment])
        off = ~np.asarray(e.action_BT)
        np.testing.assert_array_equal(out[rule].advantage_BT[off], 0)


# --- against a loop ------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_chains_against_a_loop(discounted, seed):
    rows = random_rows(seed)
    for chosen, out in discounted(batch_of(rows)).items():
        advantage, target = loop(rows, *chosen, 0.9, (0.8, 0.6))
        # float32 sums of at most 28 terms of order 1
        np.testing.assert_allclose(out.advantage_BT, advantage, atol=1e-5, err_msg=str(chosen))
        np.testing.assert_allclose(out.return_MBT, target, atol=1e-5, err_msg=str(chosen))


# --- properties ----------------------------------------------------------------------------------------------------


def to_come(rows: list[Segment], b: int, truncation: str) -> np.ndarray:
    """Rewards from each token of a row on, in this row and in the later ones, with the value behind the last."""
    row = rows[b]
    later = [other for other in rows if other.episode == row.episode and other.segment > row.segment]
    last = max([row, *later], key=lambda other: other.segment)
    bootstrap = last.ending == Ending.TRUNCATED and truncation == "bootstrap"
    rest = sum(other.reward.sum() for other in later) + last.value[:, -1] * bootstrap
    return rest[:, None] + np.cumsum(row.reward[::-1])[::-1][None]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), exact=st.booleans())
def test_undiscounted_advantages_are_the_rewards_to_come_minus_the_value(undiscounted, seed, exact):
    """With numbers that float32 adds exactly, exactly so; and `scale` is `chain`."""
    rows = random_rows(seed, gaps=False)
    for row in rows if exact else ():
        row.value, row.reward = np.round(row.value * 64) / 64, np.round(row.reward * 64) / 64
    # Otherwise a telescope of at most 4 x 7 terms, on the way below 16: two roundings of 2^-21 a term.
    atol = 0 if exact else 28 * 2 * 2**-21
    for (_, _, truncation), out in undiscounted(batch_of(rows)).items():
        for b, row in enumerate(rows):
            if not row.valid:
                continue
            at, want = np.flatnonzero(row.action), to_come(rows, b, truncation)
            value = row.value[:, :-1].mean(0)
            np.testing.assert_allclose(out.return_MBT[:, b, at], want[:, at], rtol=0, atol=atol)
            np.testing.assert_allclose(out.advantage_BT[b, at], (want.mean(0) - value)[at], rtol=0, atol=atol)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_chain_is_the_uncut_episode(discounted, seed):
    """An uncut row has the segments' steps one after the other. Under `skip` an observation may stand between them."""
    rng = np.random.default_rng(seed)
    count, last = int(rng.integers(2, 4)), Ending(int(rng.integers(0, 2)))
    chain = [random_segment(rng, 3, s, last if s == count - 1 else Ending.CUT) for s in range(count)]
    for mask_rule in MASK_RULES:
        whole, places = join(chain, 4, gap=1 if mask_rule == "skip" else 0)
        results = discounted(batch_of([*chain[::-1], whole]))
        for truncation in TRUNCATIONS:
            out = results[mask_rule, "chain", truncation]
            for s, row in enumerate(chain):
                at, b = np.flatnonzero(row.action), count - 1 - s
                # As in the test against a loop.
                np.testing.assert_allclose(out.advantage_BT[b, at], out.advantage_BT[count, places[s] + at], atol=1e-5)
                np.testing.assert_allclose(
                    out.return_MBT[:, b, at], out.return_MBT[:, count, places[s] + at], atol=1e-5
                )


def bits(out: dict[tuple[str, ...], Advantage]) -> np.ndarray:
    """All results, as one array of integers with the rows in front."""
    arrays = [
        x if x.ndim == 3 else x[None] for result in out.values() for x in (result.advantage_BT, result.return_MBT)
    ]
    return np.moveaxis(np.concatenate(arrays), 1, 0).view(np.int32)


def test_only_the_rows_of_an_episode_matter_to_it(discounted):
    """To the bit: not their order, not other rows, not what stands in rows that fill the batch."""
    rows = [row for seed in range(100) for row in random_rows(seed) if row.valid][:B]
    e = batch_of(rows)
    before = bits(discounted(e))
    order = np.random.default_rng(0).permutation(B)
    np.testing.assert_array_equal(bits(discounted(batch_of([rows[i] for i in order]))), before[order])
    chosen = {row.episode for row in rows[:4]}
    few = np.array([row.episode in chosen for row in rows])
    filler = e._replace(
        valid_B=jnp.asarray(few),
        episode_B=jnp.where(few, e.episode_B, -1),
        action_BT=e.action_BT & few[:, None],
        reward_BT=jnp.where(few[:, None], e.reward_BT, jnp.nan),
        ending_B=jnp.where(few, e.ending_B, Ending.ERROR),
    )
    np.testing.assert_array_equal(bits(discounted(filler))[few], before[few])


def test_an_episode_of_one_row_knows_no_cut_rule(discounted):
    rows = [row for seed in range(100) for row in random_rows(seed) if row.segment == 0 and row.ending != Ending.CUT]
    rows = [Segment(**{**vars(row), "episode": b}) for b, row in enumerate(rows[:B])]
    out = discounted(batch_of(rows))
    for mask_rule, truncation in product(MASK_RULES, TRUNCATIONS):
        chain, *others = (out[mask_rule, cut_rule, truncation] for cut_rule in CUT_RULES)
        for other in others:
            np.testing.assert_array_equal(bits({(): other}), bits({(): chain}))


def test_nothing_goes_on_where_no_segment_follows_a_cut(discounted):
    """The value behind a cut row is 0.5; a failed row, another segment or another episode do not go on, nor does
    anything go on where a row terminated."""

    def row(value: float, episode: int, segment: int, ending: Ending = Ending.CUT, valid: bool = True) -> Segment:
        values = np.array([[9, value, 2 * value]] * M)
        return Segment(np.array([False, True]), np.array([0, 1.0]), values, episode, segment, ending, valid)

    others = [row(7, 4, 2), row(7, 3, 2, valid=False), row(7, 3, 0, valid=False), row(7, 5, 1, Ending.TERMINATED)]
    results = discounted(batch_of([row(0.25, 3, 1), row(0.25, 5, 0, Ending.TERMINATED), *others]))
    for (_, cut_rule, _), out in results.items():
        np.testing.assert_allclose(out.advantage_BT[0, 1], 1 + 0.9 * 0.5 - 0.25, rtol=1e-6)
        np.testing.assert_allclose(out.return_MBT[:, :2, 1], [[1 + 0.9 * 0.5, 1]] * M, rtol=1e-6)
        assert cut_rule == "scale" or out.advantage_BT[1, 1] == 0.75


def test_mask_out_leaves_all_rows_of_a_truncated_episode_out(discounted):
    rows = hand([[0.25, 0.5], [2], [0.75]], [[0.125, 0], [0], [1]], 0)
    rows[-1].ending = Ending.TRUNCATED
    rows = [Segment(**{**vars(row), "value": np.repeat(row.value, M, 0)}) for row in rows]
    for (_, _, truncation), out in discounted(batch_of(rows)).items():
        for b, row in enumerate(rows):
            at = np.flatnonzero(row.action)
            assert (truncation == "mask_out") == (not out.advantage_BT[b].any())
            assert (truncation == "mask_out") == np.array_equal(out.return_MBT[:, b, at], row.value[:, at])


def test_a_chain_whose_end_has_no_room_for_its_value_is_not_silent(discounted):
    long = np.ones(T, bool)
    end = Segment(long, np.zeros(T), np.zeros((M, T)), 0, 1, Ending.TRUNCATED)
    start = Segment(long[:3], np.zeros(3), np.zeros((M, 4)), 0, 0, Ending.CUT)
    for (_, _, truncation), out in discounted(batch_of([start, end])).items():
        assert np.isnan(out.advantage_BT[:2]).any(axis=1).tolist() == [truncation == "bootstrap"] * 2


def test_chains_over_devices():
    """Rows of one episode lie on different devices."""
    e = batch_of(random_rows(5))
    run = jax.jit(lambda e: [GAE(cut_rule=rule)(e) for rule in CUT_RULES])
    split = shard_rows(e._replace(value_MBT=None), MeshConfig(data=4).build())
    split = split._replace(value_MBT=shard_rows(e.value_MBT, MeshConfig(data=4).build(), axis=1))
    for one, four in zip(jax.tree.leaves(run(e)), jax.tree.leaves(run(split)), strict=True):
        # Rewards of rows are added up in another order.
        np.testing.assert_allclose(one, four, atol=2e-6)
