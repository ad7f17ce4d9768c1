"""PPO's clipped loss by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.losses import GSPO, PPOClip
from ppojax.types import Batch, TokenStats
from small_batch import experience_of, token_row

RATIO = np.asarray([1.1, 1.5, 0.5, 0.9, 0.5, 4.0])
A = np.asarray([2.0, 1.0, 1.0, -1.0, -2.0, -3.0])
OLD = np.full(6, 0.2)


def batch(a=A) -> Batch:
    return token_row(a, old=np.log(OLD))


def stats(ratio=RATIO) -> TokenStats:
    return TokenStats(jnp.asarray([np.log(OLD * ratio)], jnp.float32))


def slope(loss, b: Batch, s: TokenStats) -> np.ndarray:
    return np.asarray(jax.grad(lambda logp: loss(s._replace(logp=logp), b).sum)(s.logp))


@pytest.mark.parametrize(
    ("settings", "value", "gradient"),
    [
        # clipped where A > 0 and r > 1.2 (token 1), or A < 0 and r < 0.8 (token 4); loss -A r elsewhere
        ({}, [-2.2, -1.2, -0.5, 0.9, 1.6, 12.0], [-2.2, 0, -0.5, 0.9, 0, 12.0]),
        ({"clip_high": 0.6}, [-2.2, -1.5, -0.5, 0.9, 1.6, 12.0], [-2.2, -1.5, -0.5, 0.9, 0, 12.0]),
        ({"clip_low": 0.6}, [-2.2, -1.2, -0.5, 0.9, 1.0, 12.0], [-2.2, 0, -0.5, 0.9, 1.0, 12.0]),
        # the dual clip bounds the last token at -A c = 9
        ({"dual_clip": 3.0}, [-2.2, -1.2, -0.5, 0.9, 1.6, 9.0], [-2.2, 0, -0.5, 0.9, 0, 0]),
    ],
)
def test_by_hand(settings, value, gradient):
    loss = PPOClip(**settings)
    out = jax.jit(loss.__call__)(stats(), batch())
    np.testing.assert_allclose(out.sum, np.sum(value), rtol=1e-5)
    assert out.weight == 6
    np.testing.assert_allclose(slope(loss, batch(), stats())[0], gradient, rtol=1e-5, atol=1e-7)


def test_metrics():
    out = PPOClip(dual_clip=3.0)(stats(), batch())
    np.testing.assert_allclose(out.metrics["actor/pg_clipfrac"], (2, 6))
    np.testing.assert_allclose(out.metrics["actor/pg_clipfrac_lower"], (1, 6))
    np.testing.assert_allclose(out.metrics["actor/ppo_kl"], (-np.log(RATIO).sum(), 6), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["actor/pg_loss"], (out.sum, 6))
    assert "actor/pg_clipfrac_lower" not in PPOClip()(stats(), batch()).metrics


def test_at_the_old_policy_it_is_reinforce():
    """r = 1 ties both branches of the maximum; the gradient is whole, not halved."""
    np.testing.assert_allclose(slope(PPOClip(), batch(), stats(np.ones(6)))[0], -A, rtol=1e-5)


def test_zero_advantage_and_masked_rows():
    np.testing.assert_array_equal(slope(PPOClip(), batch(np.zeros(6)), stats()), 0)
    b = Batch(experience_of([[0] * 6], old=[np.log(OLD)]), jnp.ones((1, 6)))
    out = PPOClip()(stats(), b)
    assert (float(out.sum), float(out.weight)) == (0, 0)
    np.testing.assert_array_equal(slope(PPOClip(), b, stats()), 0)


@pytest.mark.parametrize("a", [1.0, -1.0])
@pytest.mark.parametrize("logp", [0.0, -900.0])
@pytest.mark.parametrize("old", [0.0, -900.0])
def test_finite_where_the_ratio_overflows(a, logp, old):
    b, s = token_row([a], old=[old]), TokenStats(jnp.asarray([[logp]]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((PPOClip()(s, b), slope(PPOClip(), b, s))))


def test_needs_the_old_policy():
    assert PPOClip().needs == {"logp_old"}
    with pytest.raises(AssertionError, match="logp_old was not scored"):
        PPOClip()(stats(), token_row(A))


@pytest.mark.parametrize("kind", [PPOClip, GSPO])
def test_the_ratio_may_be_to_the_sampler(kind):
    """The same numbers with the sampler in the old policy's place; nothing is to be scored."""
    loss = kind(anchor="behavior")
    assert loss.needs == frozenset() and kind().needs == {"logp_old"}
    b, s = token_row(A, behavior=np.log(OLD)), stats()
    np.testing.assert_array_equal(loss(s, b).sum, kind()(s, batch()).sum)
    np.testing.assert_array_equal(slope(loss, b, s), slope(kind(), batch(), s))
