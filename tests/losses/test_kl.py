"""KL estimators: values, gradients, expectations."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.kernels import token_stats
from ppojax.losses import DPPO, KLPenalty, kl_estimate
from ppojax.types import Batch, TokenStats
from small_batch import experience_of, token_row

VALUE = {
    "k1": lambda x: x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: math.exp(-x) - 1 + x,
    "k3+": lambda x: math.exp(-x) - 1 + x,
}
SLOPE = {"k1": lambda x: 1.0, "k2": lambda x: x, "k3": lambda x: 1 - math.exp(-x), "k3+": lambda x: x}


@pytest.mark.parametrize("x", [-2.0, -0.5, 0.25, 3.0])
@pytest.mark.parametrize("name", VALUE)
def test_value_and_gradient(name, x):
    def estimate(logp, logp_ref):
        return kl_estimate(logp, logp_ref, name)

    logp, logp_ref = jnp.float32(-1 + x), jnp.float32(-1)
    value, slopes = jax.value_and_grad(estimate, (0, 1))(logp, logp_ref)
    np.testing.assert_allclose(value, VALUE[name](x), rtol=1e-6)
    np.testing.assert_allclose(slopes[0], SLOPE[name](x), rtol=1e-6)
    assert slopes[1] == 0


@pytest.mark.parametrize("name", VALUE)
@pytest.mark.parametrize("x", [-1e4, 1e4, -np.inf])
def test_finite_where_the_ratio_overflows(name, x):
    value, slope = jax.value_and_grad(lambda logp: kl_estimate(logp, jnp.float32(0), name))(jnp.float32(x))
    assert np.isfinite(value)
    assert np.isfinite(slope)


@pytest.mark.parametrize("name", ["k2", "k3+"])
def test_expected_gradient_is_that_of_the_kl(name):
    """Summed over the actions of a softmax, each with its probability, k2's gradient is the KL's; k3's is not."""
    z, z_ref = jnp.asarray([0.3, -1.0, 2.0]), jnp.asarray([0.0, 0.5, 1.0])

    def kl(z):
        logp = jax.nn.log_softmax(z)
        return jnp.sum(jnp.exp(logp) * (logp - jax.nn.log_softmax(z_ref)))

    def expected(z, name):
        logp = jax.nn.log_softmax(z)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * kl_estimate(logp, jax.nn.log_softmax(z_ref), name))

    np.testing.assert_allclose(jax.grad(expected)(z, name), jax.grad(kl)(z), rtol=1e-5)
    assert np.abs(jax.grad(expected)(z, "k3") - jax.grad(kl)(z)).max() > 0.05
    np.testing.assert_allclose(expected(z, "k1"), kl(z), rtol=1e-5)
    np.testing.assert_allclose(expected(z, "k3"), kl(z), rtol=1e-5)


def test_importance_weight():
    """pi/mu = 4 weights the penalty by the cap 3, pi/mu = 1/2 by itself; the weight has no gradient."""
    logp = jnp.log(jnp.asarray([[0.4, 0.2]]))
    experience = experience_of([[1, 1]], behavior=np.log([[0.1, 0.4]]), ref=logp - 1.0)
    penalty = KLPenalty(coefficient=1.0, estimator="k2", importance_cap=3.0)
    np.testing.assert_allclose(penalty(TokenStats(logp), experience), [[3 * 0.5, 0.5 * 0.5]], rtol=1e-5)
    slope = jax.grad(lambda logp: penalty(TokenStats(logp), experience).sum())(logp)
    np.testing.assert_allclose(slope, [[3.0, 0.5]], rtol=1e-5)
    bare = KLPenalty(coefficient=1.0, estimator="k2", importance_cap=None)
    np.testing.assert_allclose(bare(TokenStats(logp), experience), [[0.5, 0.5]], rtol=1e-5)


@pytest.mark.parametrize(("cap", "weight"), [(3.0, [3.0, 0.5]), (None, [1.0, 1.0])])
def test_the_exact_kl_is_weighted_alike(cap, weight):
    logp, kl = jnp.log(jnp.asarray([[0.4, 0.2]])), jnp.asarray([[0.7, 0.1]])
    experience = experience_of([[1, 1]], behavior=np.log([[0.1, 0.4]]))
    penalty = KLPenalty(coefficient=1.0, estimator="full", importance_cap=cap)
    assert penalty.needs == {"hidden_ref"} and KLPenalty(estimator="full").needs == frozenset()
    slopes = jax.grad(lambda s: penalty(s, experience).sum())(TokenStats(logp, kl_ref=kl))
    np.testing.assert_allclose(slopes.kl_ref, [weight], rtol=1e-5)
    np.testing.assert_array_equal(slopes.logp, 0)
    with pytest.raises(AssertionError, match="exact KL penalty, but kl_ref was not computed"):
        penalty(TokenStats(logp), experience)


@pytest.mark.parametrize("head", ["pi", "ref"])
def test_penalty_and_entropy_bonus_have_their_exact_gradient(head):
    """Of 0.3 KL(pi || ref) - 0.2 H over 4 tokens, by the Jacobian of the softmax in float64; on policy, A = 0."""
    rng = np.random.default_rng(0)
    hidden, ref_hidden = rng.normal(size=(2, 4, 6)).astype(np.float32)
    head_VD, other_VD = rng.normal(size=(2, 11, 6)).astype(np.float32)
    ref_head = head_VD if head == "pi" else other_VD
    target = np.arange(4, dtype=np.int32)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p = log_softmax((hidden.astype(np.float64) @ head_VD.T) / 0.8)
    log_q = log_softmax((ref_hidden.astype(np.float64) @ ref_head.T) / 0.8)
    p = np.exp(log_p)
    d = (0.3 * p * (log_p - log_q + 1) + 0.2 * p * (log_p + 1)) / 4
    d_z = (d - p * d.sum(-1, keepdims=True)) / 0.8
    value = (0.3 * (p * (log_p - log_q)).sum() + 0.2 * (p * log_p).sum()) / 4

    loss = DPPO(kl=KLPenalty(coefficient=0.3, estimator="full"), entropy_coefficient=0.2)
    batch = token_row(np.zeros(4), behavior=log_p[target, target])

    def total(hidden, head_VD):
        other = (jnp.asarray(ref_hidden), jnp.asarray(ref_head))
        s = token_stats(hidden, head_VD, jnp.asarray(target), reference=other, kl=True, entropy=True, temperature=0.8)
        row = TokenStats(s.logp[None], s.entropy[None], kl_ref=s.kl[None])
        out = loss(row, Batch(batch.experience, batch.advantage_BT))
        return out.sum / out.weight

    got, (d_hidden, d_head) = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, head_VD)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    # The importance weight is exp of a float32 difference: 1 to some 1e-6.
    np.testing.assert_allclose(d_hidden, d_z @ head_VD.astype(np.float64), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(d_head, d_z.T @ hidden.astype(np.float64), rtol=1e-4, atol=1e-6)
