"""One draw: the right frequencies, the right log-probability, and never a token that cannot be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.rollout.draw import BLOCK, NO_CUTS, Cuts, cut, greedy_choice, sample

draw = jax.jit(sample)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max()
    return x - np.log(np.exp(x).sum())


def draws(logits: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    token_B, logp_B = draw(jnp.broadcast_to(logits, (len(uniform), len(logits))), jnp.asarray(uniform, jnp.float32))
    return np.asarray(token_B), np.asarray(logp_B)


@pytest.mark.parametrize("vocab", [7, BLOCK, 600])
def test_an_even_grid_of_uniforms_gives_the_softmax(vocab: int) -> None:
    """Inverting the CDF gives each token the whole share of a grid that is its own: no luck is involved."""
    logits = np.random.default_rng(vocab).normal(0, 2, vocab).astype(np.float32)
    count = 20_000
    token, logp = draws(logits, (np.arange(count) + 0.5) / count)
    got, want = np.bincount(token, minlength=vocab), count * np.exp(log_softmax(logits))
    # An interval of the grid holds its length up to 1; float32 sums move its ends by 20000 * 2^-22.
    assert np.abs(got - want).max() < 1.1
    np.testing.assert_allclose(logp, log_softmax(logits)[token], rtol=1e-6, atol=2e-6)


def test_random_uniforms_give_the_softmax() -> None:
    """Chi-square over 600 tokens (not a multiple of the block), those under 5 expected draws taken together."""
    logits = np.random.default_rng(0).normal(0, 1.5, 600).astype(np.float32)
    token, _ = draws(logits, np.asarray(jax.random.uniform(jax.random.key(0), (20_000,))))
    got, want = np.bincount(token, minlength=600), 20_000 * np.exp(log_softmax(logits))
    rare = want < 5
    got, want = np.append(got[~rare], got[rare].sum()), np.append(want[~rare], want[rare].sum())
    freedom = len(want) - 1
    # Mean and deviation of a chi-square are n and sqrt(2n): this is five deviations, one draw in a million.
    assert abs(((got - want) ** 2 / want).sum() - freedom) < 5 * np.sqrt(2 * freedom)


def test_probabilities_near_zero_and_one() -> None:
    logits = np.array([-40.0, 0.0, -25.0, -90.0], np.float32)
    token, logp = draws(logits, np.linspace(0, 1 - 2**-24, 1000))
    assert set(token[1:-1]) == {1} and np.abs(logp[1:-1]).max() <= 2**-23
    sure, logp = draws(np.array([-40.0, 0.0], np.float32), np.zeros(1))
    assert sure[0] == 0 and logp[0] == np.float32(-40)  # at u = 0 a token of probability e^-40 may still be drawn


ENDS = [0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0]  # float32 uniforms stay below 1; rounding must not matter anyway


@pytest.mark.parametrize("possible", [[3], [255], [256], [599], [3, 300], [0, 255, 256, 511, 512, 599]])
def test_a_token_of_no_probability_is_never_drawn(possible: list[int]) -> None:
    logits = np.full(600, -np.inf, np.float32)
    logits[possible] = np.random.default_rng(len(possible)).normal(size=len(possible))
    token, logp = draws(logits, np.array(ENDS))
    assert set(token) <= set(possible)
    assert np.isfinite(logp).all() and token[0] == possible[0] and token[-1] == possible[-1]


def test_rounding_between_blocks_draws_nothing_impossible() -> None:
    """Uniforms at the ends of the first blocks' masses, and one step of float32 around them."""
    rng = np.random.default_rng(0)
    row_RV, uniform_R = [], []
    for _ in range(500):
        logits = np.full(4 * BLOCK, -np.inf, np.float32)
        possible = np.arange(4) * BLOCK + rng.integers(1, BLOCK - 1, 4)  # never at the edge of a block
        logits[possible] = rng.normal(0, 3, 4)
        mass = np.exp(logits - logits.max()).reshape(4, BLOCK).sum(1)
        for end in (np.cumsum(mass) / mass.sum())[:3].astype(np.float32):
            for u in (np.nextafter(end, np.float32(0)), end, np.nextafter(end, np.float32(1))):
                row_RV.append(logits)
                uniform_R.append(u)
    logits_RV = np.array(row_RV)
    token_R, logp_R = draw(jnp.asarray(logits_RV), jnp.asarray(uniform_R, jnp.float32))
    assert np.isfinite(logits_RV[np.arange(len(logits_RV)), token_R]).all()
    assert np.isfinite(logp_R).all()


def test_greedy_is_the_argmax_and_its_probability() -> None:
    logits_BV = np.random.default_rng(1).normal(0, 2, (50, 600)).astype(np.float32)
    token_B, logp_B = jax.jit(greedy_choice)(jnp.asarray(logits_BV))
    np.testing.assert_array_equal(token_B, logits_BV.argmax(1))
    want = [log_softmax(row)[t] for row, t in zip(logits_BV, np.asarray(token_B), strict=True)]
    np.testing.assert_allclose(logp_B, want, rtol=1e-6, atol=1e-6)


def kept_by_hand(logits: np.ndarray, cuts: Cuts) -> set[int]:
    """By sorting: top-k, then the fewest that hold top-p of what is left, then min-p."""
    order = list(np.argsort(-logits, kind="stable"))[: cuts.top_k or None]
    share = np.exp(logits[order].astype(np.float64) - logits.max())
    share /= share.sum()
    order = order[: int(np.searchsorted(np.cumsum(share), cuts.top_p)) + 1]
    return {int(t) for t in order if np.exp(logits[t] - logits.max()) >= cuts.min_p}


@pytest.mark.parametrize(
    "cuts", [Cuts(top_k=5), Cuts(top_p=0.8), Cuts(min_p=0.1), Cuts(9, 0.7, 0.05), Cuts(top_k=900), Cuts(top_p=1e-6)]
)
def test_cuts_keep_what_sorting_keeps(cuts: Cuts) -> None:
    logits_BV = np.random.default_rng(2).normal(0, 2, (20, 300)).astype(np.float32)
    got_BV = np.asarray(jax.jit(cut, static_argnums=1)(jnp.asarray(logits_BV), cuts))
    for got, logits in zip(got_BV, logits_BV, strict=True):
        kept = set(np.flatnonzero(np.isfinite(got)).tolist())
        assert kept == kept_by_hand(logits, cuts)
        np.testing.assert_array_equal(got[list(kept)], logits[list(kept)])
    token, logp = draws(got_BV[0], (np.arange(999) + 0.5) / 999)
    assert set(token) <= kept_by_hand(logits_BV[0], cuts)
    np.testing.assert_allclose(logp, log_softmax(got_BV[0])[token], rtol=1e-5, atol=1e-5)


def test_without_cuts_nothing_is_computed() -> None:
    logits_BV = jnp.zeros((2, 3))
    assert cut(logits_BV, NO_CUTS) is logits_BV
