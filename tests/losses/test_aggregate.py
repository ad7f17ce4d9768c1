"""Aggregation by hand, and that the parts of a batch add up."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from ppojax.losses import Aggregation

X = jnp.asarray([[1.0, 2.0, 9.0, 4.0], [5.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, jnp.nan]])
MASK = jnp.asarray([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)

BY_HAND = {
    "token_mean": (12.0, 4.0),
    "seq_mean_token_mean": (7 / 3 + 5, 2.0),
    "seq_mean_token_sum": (12.0, 2.0),
    "constant": (12 / 8, 2.0),
}


def aggregation(mode: str) -> Aggregation:
    return Aggregation(mode=mode, constant=8.0 if mode == "constant" else None)


@pytest.mark.parametrize("mode", BY_HAND)
def test_by_hand(mode):
    np.testing.assert_allclose(aggregation(mode)(X, MASK), BY_HAND[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", BY_HAND)
def test_parts_add_up(mode):
    parts = [aggregation(mode)(X[b : b + 1], MASK[b : b + 1]) for b in range(3)]
    np.testing.assert_allclose(np.sum(parts, axis=0), BY_HAND[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", BY_HAND)
def test_nothing_counts(mode):
    np.testing.assert_array_equal(aggregation(mode)(X, jnp.zeros_like(MASK)), (0, 0))


@pytest.mark.parametrize("settings", [{"mode": "constant"}, {"mode": "token_mean", "constant": 8.0}])
def test_the_constant_goes_with_its_mode(settings):
    with pytest.raises(ValidationError, match="set `constant` when, and only when, mode=constant"):
        Aggregation(**settings)
