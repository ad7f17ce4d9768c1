"""Sums with weights: what is off the mask does not count, and parts add up to the whole."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.masking import finish, masked_max, masked_mean, reduce_parts
from ppojax.types import Max, Mean

X = jnp.asarray([[1.0, jnp.nan, 3.0], [-jnp.inf, 8.0, -2.0]])
MASK = jnp.asarray([[True, False, True], [False, False, True]])


def test_values_off_the_mask_do_not_count() -> None:
    got = masked_mean(X, MASK)
    assert (float(got.sum), float(got.weight)) == (2.0, 3.0)
    assert float(masked_max(X, MASK).value) == 3.0


def test_parts_add_up_to_the_whole() -> None:
    parts = [{"mean": masked_mean(X[i], MASK[i]), "max": masked_max(X[i], MASK[i])} for i in range(2)]
    stacked = {
        "mean": Mean(jnp.stack([p["mean"].sum for p in parts]), jnp.stack([p["mean"].weight for p in parts])),
        "max": Max(jnp.stack([p["max"].value for p in parts])),
    }
    got = finish(reduce_parts(stacked))
    assert float(got["mean"]) == pytest.approx(2 / 3)  # not the mean of the parts' means, which is 0
    assert float(got["max"]) == 3.0


def test_where_nothing_counts_there_is_zero() -> None:
    nothing = jnp.zeros_like(MASK)
    got = finish({"mean": masked_mean(X, nothing), "max": masked_max(X, nothing)})
    assert (float(got["mean"]), float(got["max"])) == (0.0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_told(value: float) -> None:
    x, mask = jnp.asarray([1.0, value]), jnp.asarray([True, True])
    got = finish({"mean": masked_mean(x, mask), "max": masked_max(x, mask)})
    np.testing.assert_equal((float(got["mean"]), float(got["max"])), (value, value))
