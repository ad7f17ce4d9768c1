"""KL estimators: values, gradients, expectations."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.losses import KLPenalty, kl_estimate

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
    mu = jnp.log(jnp.asarray([[0.1, 0.4]]))
    logp = jnp.log(jnp.asarray([[0.4, 0.2]]))
    ref = logp - 1.0
    penalty = KLPenalty(coefficient=1.0, estimator="k2", importance_cap=3.0)
    np.testing.assert_allclose(penalty(logp, ref, mu), [[3 * 0.5, 0.5 * 0.5]], rtol=1e-5)
    slope = jax.grad(lambda logp: penalty(logp, ref, mu).sum())(logp)
    np.testing.assert_allclose(slope, [[3.0, 0.5]], rtol=1e-5)
    bare = KLPenalty(coefficient=1.0, estimator="k2", importance_cap=None)
    np.testing.assert_allclose(bare(logp, ref, mu), [[0.5, 0.5]], rtol=1e-5)
