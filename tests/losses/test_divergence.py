"""Binary divergences and log-ratios against float64, to the edges of float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppojax.losses.divergence import binary_kl, binary_tv, log1mexp, log_ratio, topk_divergence

topk = jax.jit(topk_divergence)
binary = jax.jit(lambda a, b: (binary_tv(a, b), binary_kl(a, b)))


def over_topk(mu, pi, k, drawn):
    """What the loss sees of two distributions: the K likeliest under mu, and the drawn token."""
    mu, pi = (np.asarray(x, np.float64) for x in (mu, pi))
    ids = np.argsort(-mu, kind="stable")[:k]
    with np.errstate(divide="ignore"):
        log_mu, log_pi = np.log(mu).astype(np.float32), np.log(pi).astype(np.float32)
    return topk(log_mu[ids], log_pi[ids], log_mu[drawn], log_pi[drawn], jnp.asarray(drawn in ids))


@pytest.mark.parametrize(
    ("k", "drawn", "tv", "kl"),
    [
        (1, 0, 0.3, 0.5 * np.log(2.5) + 0.5 * np.log(0.625)),  # the drawn one is listed: {0} and the rest
        (1, 2, 0.3, 0.5 * np.log(2.5) + 0.1 * np.log(0.25)),  # {0} {2} and a rest of .4 on both sides
        (1, 1, 0.3, 0.5 * np.log(2.5) + 0.2 * np.log(0.4)),  # {0} {1} and .2 against .5
        (3, 3, 0.3, 0.5 * np.log(2.5) + 0.1 * np.log(0.25)),  # all four: nothing is left for the rest
        (4, 2, 0.3, 0.5 * np.log(2.5) + 0.1 * np.log(0.25)),
    ],
)
def test_topk_by_hand(k, drawn, tv, kl):
    got = over_topk([0.5, 0.3, 0.1, 0.1], [0.2, 0.3, 0.4, 0.1], k, drawn)
    np.testing.assert_allclose(got, (tv, kl), rtol=0, atol=2e-6)


def test_topk_sees_what_binary_cannot():
    """The drawn token has moved by .05, two others by .35 between them."""
    mu, pi = [0.2, 0.5, 0.2, 0.1], [0.15, 0.15, 0.6, 0.1]
    assert binary_tv(jnp.log(0.2), jnp.log(0.15)) == pytest.approx(0.05, abs=1e-6)
    assert over_topk(mu, pi, 2, 0).tv == pytest.approx(0.4, abs=1e-6)


def binary_over(mu, pi, drawn):
    a, b = (np.log(x[np.arange(len(x)), drawn]).astype(np.float32) for x in (mu, pi))
    return binary(a, b)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.sampled_from([1, 3, 12]),
    spread=st.sampled_from([0.0, 0.5, 2.0, 5.0]),
    step=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
)
def test_topk_against_float64_and_in_order(seed, k, spread, step):
    """64 pairs of distributions over 12 tokens, near and far; every support is bounded by the next finer one."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(64, 12)) * spread
    mu, pi = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (z, z + rng.normal(size=z.shape) * step))
    row, drawn = np.arange(64), rng.integers(0, 12, 64)
    ids = np.argsort(-mu, axis=1, kind="stable")[:, :k]
    member = np.zeros((64, 13), bool)
    member[row[:, None], ids] = member[row, drawn] = True
    left = [np.where(member[:, :12], 0, x).sum(1) for x in (mu, pi)]
    member[:, 12] = np.minimum(*left) > 0
    p, q = (np.where(member, np.append(x, [[y] for y in rest], 1), 1.0) for x, rest in zip((mu, pi), left, strict=True))
    tv, kl = 0.5 * np.abs(p - q).sum(1), (p * np.log(p / q)).sum(1)

    log_mu, log_pi = np.log(mu).astype(np.float32), np.log(pi).astype(np.float32)
    at = (row[:, None], ids)
    got = topk(
        log_mu[at], log_pi[at], log_mu[row, drawn], log_pi[row, drawn], jnp.asarray((ids == drawn[:, None]).any(1))
    )
    # A mass is known to some 4e-7, its logarithm to that over the mass.
    slack = 2e-6 + 8e-7 * (left[0] + 1e-7) / np.maximum(left[1], 1e-7)
    assert np.all((got.tv >= 0) & (got.tv <= 1) & (got.kl >= 0))
    np.testing.assert_allclose(got.tv, tv, rtol=0, atol=1e-6)
    np.testing.assert_array_less(np.abs(got.kl - kl), slack + 1e-6 * kl)
    coarse_tv, coarse_kl = binary_over(mu, pi, drawn)
    others = 8e-7 * (1 - mu[row, drawn]) / np.maximum(1 - pi[row, drawn], 1e-7)
    np.testing.assert_array_less(coarse_tv, got.tv + 1e-6)
    np.testing.assert_array_less(coarse_kl, got.kl + slack + others)
    np.testing.assert_array_less(got.tv, 0.5 * np.abs(mu - pi).sum(1) + 1e-6)
    np.testing.assert_array_less(got.kl, (mu * np.log(mu / pi)).sum(1) * (1 + 1e-6) + slack)


@pytest.mark.parametrize("other", [[0.0, -200.0, -300.0], [-1e-8, -18.0, -200.0], [-np.inf, -np.inf, -1e-9]])
@pytest.mark.parametrize("top", [[0.0, -200.0], [-1e-9, -90.0], [-0.7, -0.8], [-np.inf, -1e4]])
def test_topk_is_finite_at_the_edges(top, other):
    for a, b in ((top, other[:2]), (other[:2], top)):
        got = topk(jnp.asarray(a), jnp.asarray(b), jnp.float32(-50), jnp.float32(other[2]), jnp.asarray(False))
        assert 0 <= got.tv <= 1 and 0 <= got.kl < 110
    same = topk(jnp.asarray(top), jnp.asarray(top), jnp.float32(-3), jnp.float32(-3), jnp.asarray(True))
    assert same == (0, 0)


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
