"""Rotary frequencies of each stretching, against their papers' formulas."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from decoder_by_hand import YARN, frequency
from ppojax.models.rope import frequencies, rotary, rotate
from ppojax.models.spec import RopeSpec

LLAMA3 = RopeSpec(theta=500_000.0, scaling="llama3", factor=8.0, original=8192)
GPT_OSS = RopeSpec(theta=150_000.0, scaling="yarn", factor=32.0, original=4096, truncate=False)
DEEPSEEK = RopeSpec(theta=10_000.0, scaling="yarn", factor=40.0, original=4096)


@pytest.mark.parametrize(
    ("rope", "width"),
    [
        (RopeSpec(theta=500.0), 6),
        (RopeSpec(theta=1e6, scaling="linear", factor=8.0), 256),
        (LLAMA3, 128),
        (GPT_OSS, 64),
        (DEEPSEEK, 64),
        (YARN, 4),
        (RopeSpec(theta=1e4, scaling="yarn", factor=4.0, original=16, beta_fast=32.0), 8),  # a ramp that is cut off
    ],
)
def test_frequencies(rope: RopeSpec, width: int) -> None:
    # The grid on which the ends of yarn's ramp are found is 1e-5 of the width fine.
    np.testing.assert_allclose(frequencies(rope, width), frequency(rope, width), rtol=2e-4)


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    got, plain = np.array(frequencies(LLAMA3, 128)), 500_000.0 ** (-np.arange(64) / 64)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(got[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_allclose(got[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength >= 2048) & (wavelength <= 8192)
    assert between.sum() > 2
    assert np.all((got < plain) & (got > plain / 8) | ~between)


@pytest.mark.parametrize("rope", [GPT_OSS, DEEPSEEK])
def test_yarn_keeps_fast_pairs_and_stretches_slow_ones(rope: RopeSpec) -> None:
    got, plain = np.array(frequencies(rope, 64)), rope.theta ** (-np.arange(32) / 32)
    turns = rope.original * plain / (2 * np.pi)
    np.testing.assert_allclose(got[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(got[turns < 0.8], plain[turns < 0.8] / rope.factor)
    assert np.all(np.diff(got) < 0)


def test_a_ramp_of_no_length_is_a_step() -> None:
    """Both ends round to one pair: nothing is divided by 0."""
    rope = RopeSpec(theta=1e4, scaling="yarn", factor=4.0, original=6, beta_fast=32.0, beta_slow=1.0)
    np.testing.assert_allclose(frequencies(rope, 4), np.array([1.0, 0.01]) / [1, 4])


def test_magnitude_and_angles() -> None:
    position_BT = jnp.asarray([[0, 7]], jnp.int32)
    cos, sin = rotary(position_BT, 4, RopeSpec(theta=100.0, scaling="yarn", original=10**6, magnitude=1.5))
    angle = np.array([1.0, 0.1, 1.0, 0.1]) * 7
    np.testing.assert_allclose(cos[0], 1.5 * np.stack([np.ones(4), np.cos(angle)]), rtol=1e-6)
    np.testing.assert_allclose(sin[0], 1.5 * np.stack([np.zeros(4), np.sin(angle)]), rtol=1e-6)


def test_rotation_keeps_lengths_and_depends_on_differences() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 2, 1, 8)), jnp.float32)

    def product(shift: int) -> float:
        turned = rotate(x, rotary(jnp.asarray([[shift, shift + 5]], jnp.int32), 8, LLAMA3))
        np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
        return float(turned[0, 0, 0] @ turned[0, 1, 0])

    assert product(0) == pytest.approx(product(30), rel=1e-4)
