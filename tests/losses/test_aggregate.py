"""Aggregation by hand, and that the parts of a batch add up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from ppojax.advantages.chain import written_in_episodes
from ppojax.losses import Aggregation
from small_batch import experience_of

X = jnp.asarray([[1.0, 2.0, 9.0, 4.0], [5.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, jnp.nan]])
MASK = jnp.asarray([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)

BY_HAND = {
    "token_mean": (12.0, 4.0),
    "seq_mean_token_mean": (7 / 3 + 5, 2.0),
    "seq_mean_token_sum": (12.0, 2.0),
    "constant": (12 / 8, 2.0),
}


def aggregation(mode):
    return Aggregation(mode=mode, constant=8.0 if mode == "constant" else None)


@pytest.mark.parametrize("mode", BY_HAND)
def test_by_hand(mode):
    np.testing.assert_allclose(aggregation(mode)(X, MASK), BY_HAND[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", BY_HAND)
def test_parts_add_up(mode):
    parts = [aggregation(mode)(X[b : b + 1], MASK[b : b + 1]) for b in range(3)]
    np.testing.assert_allclose(np.sum(parts, axis=0), BY_HAND[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", BY_HAND)
def test_nothing_counts(mode):
    np.testing.assert_array_equal(aggregation(mode)(X, jnp.zeros_like(MASK)), (0, 0))


@pytest.mark.parametrize("settings", [{"mode": "constant"}, {"mode": "token_mean", "constant": 8.0}])
def test_the_constant_goes_with_its_mode(settings):
    with pytest.raises(ValidationError, match="set `constant` when, and only when, mode=constant"):
        Aggregation(**settings)


# Episode 0 has rows 0, 3 and 4 (3 + 1 + 0 tokens), episode 1 row 1 (2 tokens); row 2 failed.
CHAINS = jnp.asarray([[1, 2, 3, 0], [4, 0, 5, 0], [9, 9, 9, 9], [6, 0, 0, 0], [0, 0, 0, jnp.nan]], jnp.float32)
WROTE = jnp.asarray([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
EPISODES = {
    "token_mean": (21.0, 6.0),
    "seq_mean_token_mean": ((1 + 2 + 3 + 6) / 4 + (4 + 5) / 2, 2.0),
    "seq_mean_token_sum": (21.0, 2.0),
    "constant": (21 / 8, 2.0),
}
ROWS = {
    "token_mean": (21.0, 6.0),
    "seq_mean_token_mean": (2 + 4.5 + 6, 3.0),
    "seq_mean_token_sum": (21.0, 3.0),
    "constant": (21 / 8, 3.0),
}


def written() -> jax.Array:
    e = experience_of(WROTE, valid=[True, True, False, True, True])
    episode_B, segment_B = jnp.asarray([0, 1, 0, 0, 0], jnp.int32), jnp.asarray([0, 0, 3, 1, 2], jnp.int32)
    return written_in_episodes(e._replace(episode_B=episode_B, segment_B=segment_B))


@pytest.mark.parametrize("mode", EPISODES)
def test_episodes_of_several_rows(mode):
    """By hand; and the same from any parts, whose weights are shares of episodes."""
    written_B = written()
    np.testing.assert_array_equal(written_B, [4, 2, 0, 4, 4])
    by_episode = aggregation(mode)
    np.testing.assert_allclose(by_episode(CHAINS, WROTE, written_B), EPISODES[mode], rtol=1e-6)
    by_row = by_episode.model_copy(update={"sequence": "row"})
    np.testing.assert_allclose(by_row(CHAINS, WROTE, written_B), ROWS[mode], rtol=1e-6)
    parts = [by_episode(CHAINS[i], WROTE[i], written_B[i]) for i in (jnp.asarray([0, 2]), jnp.asarray([1, 3, 4]))]
    np.testing.assert_allclose(np.sum(parts, axis=0), EPISODES[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", EPISODES)
def test_cutting_an_episode_changes_nothing(mode):
    """Twenty random cuts of random episodes into rows, against the episodes in one row each."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 9, 4)
        whole = [rng.normal(size=n).astype(np.float32) for n in lengths]
        cut = [np.split(x, np.sort(rng.integers(0, len(x) + 1, rng.integers(0, 3)))) for x in whole]
        rows = [(part, len(x)) for x, parts in zip(whole, cut, strict=True) for part in parts]
        got = _aggregate(mode, [rows[i] for i in rng.permutation(len(rows))])
        np.testing.assert_allclose(got, _aggregate(mode, [(x, len(x)) for x in whole]), rtol=1e-5, atol=1e-6)


def _aggregate(mode, rows):
    x, mask = np.zeros((len(rows), 8), np.float32), np.zeros((len(rows), 8), bool)
    for b, (row, _) in enumerate(rows):
        x[b, : len(row)], mask[b, : len(row)] = row, True
    return aggregation(mode)(jnp.asarray(x), jnp.asarray(mask), jnp.asarray([n for _, n in rows], jnp.float32))
