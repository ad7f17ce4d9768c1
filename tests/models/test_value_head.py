"""Value heads against float64, and at their edges."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from ppojax.models.value_head import ArctanHead, HLGaussHead, LinearHead, ValueHead

BINS = HLGaussHead(low=-1.0, high=3.0, bins=8, sigma=0.75)  # bins of a half, sigma .375
Z = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


def gaussian_bins(y: float, head: HLGaussHead = BINS) -> np.ndarray:
    """The smoothed target in float64, bin by bin."""
    y, width = min(max(y, head.low), head.high), (head.high - head.low) / head.bins
    phi = [
        0.5 * math.erf((head.low + k * width - y) / (math.sqrt(2) * head.sigma * width)) for k in range(head.bins + 1)
    ]
    return np.diff(phi) / (phi[-1] - phi[0])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_a_linear_head_hands_its_output_on() -> None:
    z = jnp.asarray([[1.5], [-20.0]])
    np.testing.assert_array_equal(LinearHead().value(z), [1.5, -20.0])


def test_an_arctan_head_stays_inside_its_range() -> None:
    head = ArctanHead(low=-1.0, high=3.0)
    z = np.array([0.0, 1.0, -1.0, 0.3, 1e30, -1e30], np.float32)
    want = 1 + 2 * (2 / np.pi) * np.arctan(z.astype(np.float64))
    np.testing.assert_allclose(head.value(jnp.asarray(z)[:, None]), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(want[:3], [1, 2, 0], atol=1e-12)  # arctan 1 = pi/4, half of the way
    slope = jax.grad(lambda z: head.value(z[:, None]).sum())(jnp.asarray(z[:4]))
    np.testing.assert_allclose(slope, 4 / np.pi / (1 + z[:4].astype(np.float64) ** 2), rtol=1e-6)


def test_binary_cross_entropy_by_hand() -> None:
    """Of [-1, 3]: z of 1, 0, -1 are p = 3/4, 1/2, 1/4; the slope is ((1 - y) / (1 - p) - y / p) / (pi (1 + z^2))."""
    head, z = ArctanHead(low=-1.0, high=3.0), jnp.asarray([1.0, 0.0, -1.0, 1.0])
    target = jnp.asarray([2.0, 3.0, -1.0, 0.0])  # y = 3/4, 1, 0, 1/4
    got = head.cross_entropy(z[:, None], target)
    want = [-0.75 * np.log(0.75) - 0.25 * np.log(0.25), np.log(2), -np.log(0.75), -0.25 * np.log(0.75 * 0.25**3)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    by_z, by_y = jax.grad(lambda z, y: head.cross_entropy(z[:, None], y).sum(), (0, 1))(z, target)
    np.testing.assert_allclose(by_z, [0, -2 / np.pi, 2 / (3 * np.pi), 4 / (3 * np.pi)], rtol=1e-6, atol=1e-7)
    assert not by_y.any()


def test_binary_cross_entropy_at_its_edges() -> None:
    """Far out p is 1 / (pi |z|), to all digits; targets beyond the range count as its end; nothing is infinite."""
    head, z = ArctanHead(), jnp.asarray([-1e6, 1e6, -1e30, 1e30])
    for y, near in ((1.0, slice(None, None, 2)), (0.0, slice(1, None, 2))):
        at = head.cross_entropy(z[:, None], jnp.full(4, y))
        np.testing.assert_allclose(at[near], np.log(np.pi) + np.log([1e6, 1e30]), rtol=1e-6)
        np.testing.assert_array_equal(at, head.cross_entropy(z[:, None], jnp.full(4, 9 * y - 4)))
        slope = jax.grad(lambda z, y=y: head.cross_entropy(z[:, None], jnp.full(4, y)).sum())(z)
        np.testing.assert_allclose(slope[near][0], (-1 if y else 1) * 1e-6, rtol=1e-5)
        assert np.isfinite(at).all() and np.isfinite(slope).all()


@pytest.mark.parametrize("y", [-1.0, -0.9, 0.0, 0.25, 1.1, 2.99, 3.0])
def test_targets_are_gaussians_over_bins(y: float) -> None:
    got = BINS.target(jnp.asarray([y]))[0]
    np.testing.assert_allclose(got, gaussian_bins(y), atol=1e-6)
    assert float(got.sum()) == pytest.approx(1, abs=1e-6)


def test_a_target_keeps_its_mean_unless_it_is_at_an_end() -> None:
    """Two sigma (one and a half bins) from an end the loss of mass is under 3%; at the end half of it is gone."""
    y = np.linspace(-0.25, 2.25, 21)
    centre = -0.75 + 0.5 * np.arange(8)
    mean = np.asarray(BINS.target(jnp.asarray(y, jnp.float32))) @ centre
    np.testing.assert_allclose(mean, y, atol=0.03)
    assert BINS.target(jnp.asarray([3.0]))[0] @ centre < 2.8


@pytest.mark.parametrize(("far", "end"), [(1e3, 3.0), (-1e3, -1.0), (3.5, 3.0)])
def test_a_target_outside_of_the_range_counts_as_its_end(far: float, end: float) -> None:
    got = BINS.target(jnp.asarray([far, end]))
    np.testing.assert_array_equal(got[0], got[1])
    assert np.isfinite(got).all()


def test_values_are_means_of_bins() -> None:
    centre = -0.75 + 0.5 * np.arange(8)
    np.testing.assert_allclose(BINS.value(jnp.asarray(Z)), softmax(Z) @ centre, rtol=1e-5, atol=1e-6)
    certain = np.where(np.arange(8) == 6, 100.0, 0.0).astype(np.float32)
    assert float(BINS.value(jnp.asarray(certain))) == pytest.approx(2.25)


def test_cross_entropy_and_its_gradient() -> None:
    """- sum p log q; its gradient by the outputs is softmax(z) - p."""
    y = np.array([-0.4, 0.0, 1.3, 2.0, 9.0])
    p, q = np.stack([gaussian_bins(t) for t in y]), softmax(Z)
    got = BINS.cross_entropy(jnp.asarray(Z), jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(got, -(p * np.log(q)).sum(-1), rtol=1e-5)
    by_z, by_y = jax.grad(lambda z, y: BINS.cross_entropy(z, y).sum(), (0, 1))(
        jnp.asarray(Z), jnp.asarray(y, jnp.float32)
    )
    np.testing.assert_allclose(by_z, q - p, atol=1e-6)
    assert not by_y.any()


def test_fitting_the_cross_entropy_finds_the_target() -> None:
    """At its minimum q = p, so that the value is the target."""
    z = jnp.log(BINS.target(jnp.asarray([0.6])) + 1e-12)
    assert float(BINS.value(z)[0]) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("head", "centre"),
    [
        (LinearHead(), 0.0),
        (ArctanHead(low=-1, high=3), 1.0),
        (BINS, 1.0),
        (HLGaussHead(), 0.5),
        (HLGaussHead(bins=2), 0.5),
    ],
)
def test_a_new_head_says_the_centre(head: ValueHead, centre: float) -> None:
    value = head.value(jnp.zeros((3, head.outputs)))
    np.testing.assert_array_equal(value, np.full(3, centre, np.float32))


def test_ranges_and_bins_are_checked() -> None:
    with pytest.raises(ValidationError, match=r"low \(1\.0\) must be under high \(1\.0\)"):
        ArctanHead(low=1, high=1)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        HLGaussHead(bins=1)
    with pytest.raises(ValidationError, match="'linear', 'arctan', 'hl_gauss'"):
        TypeAdapter(ValueHead).validate_python({"type": "tanh"})
