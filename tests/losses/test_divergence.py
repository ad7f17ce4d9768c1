"""Binary divergences and log-ratios against float64, to the edges of float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.losses.divergence import binary_kl, binary_tv, log1mexp, log_ratio


@pytest.mark.parametrize("x", [-1e-6, -1e-3, -0.1, -0.69, -0.7, -1.0, -5.0, -30.0])
def test_log1mexp(x):
    x = np.float64(np.float32(x))
    exact = np.log(-np.expm1(x)) if x > -1 else np.log1p(-np.exp(x))
    np.testing.assert_allclose(log1mexp(jnp.float32(x)), exact, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(log1mexp)(jnp.float32(x)), np.exp(x) / np.expm1(x), rtol=1e-6)


@pytest.mark.parametrize("x", [0.0, 1e-6, -1e-12, -80.0, -1e30, -np.inf])
def test_log1mexp_is_finite_at_the_edges(x):
    value, slope = jax.value_and_grad(log1mexp)(jnp.float32(x))
    assert -16.7 < value <= 0
    assert np.isfinite(slope)


@pytest.mark.parametrize(("mu", "pi"), [(0.5, 0.25), (0.01, 0.99), (0.9, 0.9), (1e-4, 1e-2), (0.99, 0.8)])
def test_binary_divergences(mu, pi):
    a, b = jnp.log(jnp.float32(mu)), jnp.log(jnp.float32(pi))
    kl = mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi))
    # Probabilities carry a relative error of 1e-7 from their float32 logarithms.
    np.testing.assert_allclose(binary_tv(a, b), abs(mu - pi), atol=2e-7)
    np.testing.assert_allclose(binary_kl(a, b), kl, rtol=2e-6, atol=2e-7)


def test_divergence_near_one_keeps_its_digits():
    """mu = 1 - 1e-5, pi = 1 - 1e-3: 1 - p is known from log p to full precision, not from p."""
    mu, pi = -np.float64(np.float32(1e-5)), -np.float64(np.float32(1e-3))
    kl = np.exp(mu) * (mu - pi) + -np.expm1(mu) * (np.log(-np.expm1(mu)) - np.log(-np.expm1(pi)))
    np.testing.assert_allclose(binary_kl(jnp.float32(mu), jnp.float32(pi)), kl, rtol=1e-6)


@pytest.mark.parametrize("edge", [0.0, -1e-9, -90.0, -1e4, -np.inf])
@pytest.mark.parametrize("other", [0.0, -0.5, -200.0])
def test_divergences_are_finite_at_the_edges(edge, other):
    for a, b in ((edge, other), (other, edge)):
        assert 0 <= binary_kl(jnp.float32(a), jnp.float32(b)) < 110
        assert 0 <= binary_tv(jnp.float32(a), jnp.float32(b)) <= 1
    assert binary_kl(jnp.float32(edge), jnp.float32(edge)) == 0


def test_log_ratio_is_held_within_20():
    x = jnp.asarray([-1e4, -20.5, -3.0, 0.0, 3.0, 20.5, 1e4, -jnp.inf])
    held, slope = jax.vmap(jax.value_and_grad(lambda logp: log_ratio(logp, jnp.float32(0))))(x)
    np.testing.assert_array_equal(held, [-20, -20, -3, 0, 3, 20, 20, -20])
    np.testing.assert_array_equal(slope, [0, 0, 1, 1, 1, 0, 0, 0])
