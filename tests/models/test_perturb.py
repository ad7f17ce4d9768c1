"""Noise on what blocks read: its size, its gradient, what it depends on and what it does not."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from helpers import ACTOR, SPEC, params, random_experience
from ppojax.errors import ConfigError
from ppojax.models.forward import score_and_route
from ppojax.models.perturb import NAME, Perturb, Perturbation, apart, perturbed, token_keys
from ppojax.types import Experience, Layout

KEY = jax.random.key(3)
PERTURB = Perturb(initial=0.1)
PLAIN = Layout()


@partial(jax.jit, static_argnames=("layout", "settings"))
def objective(
    log_sigma: jax.Array | None, p: Any, e: Experience, *, layout: Layout = PLAIN, settings: Perturb = PERTURB
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A sum of log-probabilities with signs, its gradient, and the log-probabilities."""

    def total(log_sigma: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        noise = None if log_sigma is None else Perturbation(settings, log_sigma, KEY)
        logp_BT = score_and_route(ACTOR, p, e, layout, temperature=1.0, perturbation=noise)[0].logp
        sign_BT = jnp.where(e.token_BT % 2 == 0, 1.0, -1.0)
        return jnp.sum(jnp.where(e.action_BT, sign_BT * logp_BT, 0.0)), logp_BT

    if log_sigma is None:
        value, logp_BT = total(None)
        return value, (value, logp_BT)
    (value, logp_BT), slope = jax.value_and_grad(total, has_aux=True)(log_sigma)
    return value, (slope, logp_BT)


@pytest.fixture(scope="module")
def separate() -> Experience:
    return random_experience()[0]


def test_the_gradient_of_log_sigma_is_the_slope(separate: Experience) -> None:
    """Central differences of a float32 sum of about 50 terms: a step of 0.05 errs by some 1e-3 of the slope."""
    p, start = params(), PERTURB.start(SPEC)
    _, (slope, _) = objective(start, p, separate)
    for n in range(SPEC.layers):
        step = 0.05 * np.eye(SPEC.layers, dtype=np.float32)[n]
        up, down = (float(objective(start + sign * step, p, separate)[0]) for sign in (1, -1))
        assert float(slope[n]) == pytest.approx((up - down) / 0.1, rel=0.02, abs=2e-3)
    assert np.abs(slope).min() > 0.01


def test_no_sigma_is_no_noise(separate: Experience) -> None:
    p = params()
    off, none = objective(None, p, separate), objective(jnp.full(SPEC.layers, -jnp.inf), p, separate)
    np.testing.assert_array_equal(none[1][1], off[1][1])
    np.testing.assert_array_equal(none[1][0], np.zeros(SPEC.layers))
    on = objective(PERTURB.start(SPEC), p, separate)
    assert np.abs(np.asarray(on[1][1] - off[1][1])).max() > 0.05


def test_a_shared_prompt_has_its_first_rows_noise(separate: Experience) -> None:
    """First rows are the same whether prompts are read once or not; the others read another prompt."""
    shared, layout = random_experience(share=True)
    assert layout.group == 2
    p, start = params(), PERTURB.start(SPEC)
    want, got = objective(start, p, separate)[1][1], objective(start, p, shared, layout=layout)[1][1]
    width = min(want.shape[1], got.shape[1])
    gap = np.abs(np.asarray(want)[:, :width] - np.asarray(got)[:, :width]).max(axis=1)
    assert gap[::2].max() < 1e-5 and gap[1::2].min() > 1e-3


def test_keys_follow_episode_segment_and_position() -> None:
    episode, segment = jnp.asarray([3, 1, 3], jnp.int32), jnp.asarray([0, 0, 1], jnp.int32)
    position = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (3, 4))
    data = np.asarray(jax.random.key_data(token_keys(KEY, episode, segment, position)))
    assert len({tuple(k) for k in data.reshape(12, -1).tolist()}) == 12
    moved = token_keys(KEY, episode[1:], segment[1:], position[1:, 2:])
    np.testing.assert_array_equal(jax.random.key_data(moved), data[1:, 2:])


@pytest.mark.parametrize("relative", [True, False])
def test_sigma_is_the_deviation(relative: bool) -> None:
    """Of 8192 numbers, so known to about 1%; in units of each token's own size, or absolute."""
    keys = token_keys(KEY, jnp.arange(2), jnp.zeros(2, jnp.int32), jnp.broadcast_to(jnp.arange(64), (2, 64)))
    size = jnp.asarray([1.0, 10.0]).reshape(2, 1, 1)
    x = jnp.broadcast_to(size, (2, 64, 64))
    step = np.asarray(perturbed(x, jnp.float32(0.2), keys, jnp.int32(0), relative) - x)
    np.testing.assert_allclose(step.std(axis=(1, 2)), (0.2, 2.0) if relative else (0.2, 0.2), rtol=0.05)
    assert abs(step[0].mean()) < 0.01
    other = np.asarray(perturbed(x, jnp.float32(0.2), keys, jnp.int32(1), relative) - x)
    assert abs(np.corrcoef(step.ravel(), other.ravel())[0, 1]) < 0.05
    half = perturbed(x.astype(jnp.bfloat16), jnp.float32(0.2), keys, jnp.int32(0), relative)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), x + step, rtol=2**-7, atol=2**-7)


def test_only_the_blocks_that_are_named() -> None:
    some = Perturb(initial=0.5, blocks=(1,), per="channel")
    start = some.start(SPEC)
    assert start.shape == (SPEC.layers, SPEC.width)
    np.testing.assert_allclose(some.sigma(start), np.outer([0, 0.5], np.ones(SPEC.width)), rtol=1e-6)
    with pytest.raises(ConfigError, match=r"actor\.perturb\.blocks: this model has no block 2, 7; it has 0 to 1"):
        Perturb(blocks=(0, 2, 7)).check(SPEC)
    with pytest.raises(ValidationError, match="greater than 0"):
        Perturb(initial=0.0)


def test_deviations_are_apart_from_weights() -> None:
    weights, deviations = apart({"embed": 1, NAME: 2})
    assert weights == {"embed": 1} and deviations == {NAME: 2}
