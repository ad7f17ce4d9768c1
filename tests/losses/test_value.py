"""The critics' loss by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.losses import ValueLoss
from ppojax.types import Batch
from small_batch import experience_of, rows_of

OLD = np.asarray([[[0.0, 0.0, 0.0, 9.0]], [[1.0, 1.0, 1.0, 9.0]]])
TARGET = np.asarray([[[1.0, 1.0, -1.0, 9.0]], [[2.0, 0.0, 1.0, 9.0]]])
VALUE = np.asarray([[[0.1, 0.5, 0.5, 0.0]], [[1.5, 0.5, 1.0, 0.0]]])
MASK = [[1, 1, 1, 0]]


def batch(mask=MASK, target=TARGET, old=OLD) -> Batch:
    return Batch(experience_of(mask, value=old), jnp.zeros(np.shape(mask)), jnp.asarray(target, jnp.float32))


def slope(loss, b: Batch, value=VALUE) -> np.ndarray:
    return np.asarray(jax.grad(lambda v: loss(v, b).sum)(jnp.asarray(value, jnp.float32)))


def test_plain():
    """Errors V - R: critic 0 has -.9 -.5 1.5, critic 1 has -.5 .5 0."""
    out = jax.jit(ValueLoss().__call__)(jnp.asarray(VALUE, jnp.float32), batch())
    first, second = 0.5 * (0.81 + 0.25 + 2.25), 0.5 * (0.25 + 0.25)
    np.testing.assert_allclose(out.sum, first + second, rtol=1e-6)
    assert out.weight == 3
    np.testing.assert_allclose(
        slope(ValueLoss(), batch()), [[[-0.9, -0.5, 1.5, 0]], [[-0.5, 0.5, 0, 0]]], rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(out.metrics["critic/vf_loss"], ((first + second) / 2, 3), rtol=1e-6)
    np.testing.assert_allclose(out.metrics["critic/vpred_mean"], (0.5 * (1.1 + 3.0), 3), rtol=1e-6)
    assert "critic/vf_clipfrac" not in out.metrics


def test_clipped():
    """Within 0.2 of the old values: critic 0 clips to .1 .2 .2, critic 1 to 1.2 .8 1; errors -.9 -.8 1.2; -.8 .8 0.

    The larger error counts, and has no gradient where it is the clipped one.
    """
    out = ValueLoss(clip=0.2)(jnp.asarray(VALUE, jnp.float32), batch())
    np.testing.assert_allclose(out.sum, 0.5 * (0.81 + 0.64 + 2.25 + 0.64 + 0.64), rtol=1e-6)
    expected = [[[-0.9, 0, 1.5, 0]], [[0, 0, 0, 0]]]
    np.testing.assert_allclose(slope(ValueLoss(clip=0.2), batch()), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(out.metrics["critic/vf_clipfrac"], (1.5, 3))


def test_each_critic_has_the_gradient_it_has_alone():
    both = slope(ValueLoss(), batch())
    for m in range(2):
        alone = slope(ValueLoss(), batch(target=TARGET[m : m + 1], old=OLD[m : m + 1]), VALUE[m : m + 1])
        np.testing.assert_array_equal(both[m : m + 1], alone)


def test_fractional_targets_survive():
    b = Batch(experience_of([[1]]), jnp.zeros((1, 1)), jnp.full((1, 1, 1), 0.3))
    np.testing.assert_allclose(slope(ValueLoss(), b, np.zeros((1, 1, 1))), [[[-0.3]]], rtol=1e-6)


def test_nothing_to_learn_from():
    out = ValueLoss(clip=0.2)(jnp.asarray(VALUE, jnp.float32), batch(mask=[[0, 0, 0, 0]]))
    assert (float(out.sum), float(out.weight)) == (0, 0)


def test_microbatches_add_up():
    rng = np.random.default_rng(1)
    old, target, value = rng.normal(size=(3, 2, 4, 5)).astype(np.float32)
    whole = batch(rng.random((4, 5)) < 0.5, target, old)
    loss = ValueLoss(clip=0.3)
    out, grad = loss(jnp.asarray(value), whole), slope(loss, whole, value)
    parts = [(jnp.asarray(value[:, i : i + 2]), rows_of(whole, i, i + 2)) for i in (0, 2)]
    np.testing.assert_allclose(sum(loss(*p).sum for p in parts), out.sum, rtol=1e-5)
    np.testing.assert_allclose(sum(loss(*p).weight for p in parts), out.weight)
    np.testing.assert_array_equal(np.concatenate([slope(loss, b, v) for v, b in parts], axis=1), grad)


def test_targets_and_old_values_are_needed():
    value = jnp.zeros((1, 1, 1))
    with pytest.raises(AssertionError, match="no critic targets"):
        ValueLoss()(value, Batch(experience_of([[1]]), jnp.zeros((1, 1))))
    with pytest.raises(AssertionError, match="needs the values before the update"):
        ValueLoss(clip=0.2)(value, Batch(experience_of([[1]]), jnp.zeros((1, 1)), value))


def test_a_cross_entropy_takes_the_place_of_the_squared_error():
    """Only the mask, the sum and the weight are the loss's own: here 1 + 2 + 3 and 4 + 5 + 6 over three tokens."""
    given = jnp.asarray([[[1.0, 2.0, 3.0, jnp.nan]], [[4.0, 5.0, 6.0, jnp.nan]]])
    out = ValueLoss()(jnp.asarray(VALUE, jnp.float32), batch(), given)
    assert (float(out.sum), float(out.weight)) == (21, 3)
    np.testing.assert_allclose(out.metrics["critic/vf_loss"], (10.5, 3))
    np.testing.assert_allclose(out.metrics["critic/vpred_mean"], (0.5 * (1.1 + 3.0), 3), rtol=1e-6)
    assert "critic/vf_clipfrac" not in out.metrics


def test_a_scale_is_in_the_loss_and_its_slope_and_not_in_the_metrics():
    """NeMo-RL's 0.4: errors and slopes of `test_plain`, times that."""
    out = ValueLoss(scale=0.4)(jnp.asarray(VALUE, jnp.float32), batch())
    np.testing.assert_allclose(out.sum, 0.4 * (1.655 + 0.25), rtol=1e-6)
    assert out.weight == 3
    expected = [[[-0.36, -0.2, 0.6, 0]], [[-0.2, 0.2, 0, 0]]]
    np.testing.assert_allclose(slope(ValueLoss(scale=0.4), batch()), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(out.metrics["critic/vf_loss"], ((1.655 + 0.25) / 2, 3), rtol=1e-6)
