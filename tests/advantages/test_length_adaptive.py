"""A lambda that depends on the length of the episode: by hand, against the loop over chains, and at its ends."""

from __future__ import annotations

import math
from itertools import product

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from segments import batch_of, loop, random_rows

from ppojax.advantages import GAE
from small_batch import experience_of

CASES = list(product(("skip", "dense"), ("chain", "scale", "broadcast")))


@pytest.fixture(scope="module")
def adaptive():
    """All cases with their own lambda for each episode, in one program."""
    kwargs = {"gamma": 0.9, "lambda_value": 0.6, "length_alpha": 0.4}
    estimators = [GAE(mask_rule=mask, cut_rule=cut, **kwargs) for mask, cut in CASES]
    return jax.jit(lambda e: [estimator(e) for estimator in estimators])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_chains_against_a_loop(adaptive, seed):
    rows = random_rows(seed)
    for (mask, cut), out in zip(CASES, adaptive(batch_of(rows)), strict=True):
        advantage, target = loop(rows, mask, cut, "bootstrap", 0.9, (None, 0.6), 0.4)
        # As in the test of a fixed lambda: float32 sums of at most 28 terms of order 1.
        np.testing.assert_allclose(out.advantage_BT, advantage, atol=1e-5, err_msg=f"{mask} {cut}")
        np.testing.assert_allclose(out.return_MBT, target, atol=1e-5, err_msg=f"{mask} {cut}")


def test_by_hand():
    """Two rows in one batch: L = 4 gives lambda 1 - 1/(.5 4) = .5, and L = 1 gives 1 - 1/.5 < 0, so 0.

    Values .5 .25 - 1 .5 and a reward of 1 at the end: deltas -.25 .75 - -.5 .5.
    """
    e = experience_of(
        [[1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]],
        reward=[[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]],
        length=[5, 4],
        value=[[[0.5, 0.25, 9, 1, 0.5, 9], [9, 9, 9, 0.75, 9, 9]]],
    )
    out = jax.jit(GAE(length_alpha=0.5).__call__)(e).advantage_BT
    np.testing.assert_array_equal(out, [[0.0625, 0.625, 0, -0.25, 0.5, 0], [0, 0, 0, 0.25, 0, 0]])


def rows_of_three():
    """All episodes of one row and three actions, so that one lambda is that of all."""
    rng = np.random.default_rng(0)
    action = np.tile([False, True, True, False, True, False], (4, 1))
    return experience_of(action, reward=action * rng.normal(size=(4, 6)), value=rng.normal(size=(2, 4, 6)))


@pytest.mark.parametrize(("alpha", "lambda_"), [(math.inf, 1.0), (0.05, 0.0), (4 / 3, 0.75)])
def test_rows_of_one_length_have_one_lambda(alpha, lambda_):
    """Without end it is 1; where length_alpha L is 1 or less it is 0."""
    e = rows_of_three()
    estimators = GAE(length_alpha=alpha), GAE(lambda_policy=lambda_)
    adaptive, fixed = jax.jit(lambda e: [estimator(e) for estimator in estimators])(e)
    np.testing.assert_allclose(adaptive.advantage_BT, fixed.advantage_BT, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(adaptive.return_MBT, fixed.return_MBT)
    if lambda_ in (0.0, 1.0):
        np.testing.assert_array_equal(adaptive.advantage_BT, fixed.advantage_BT)


def test_the_weight_of_the_last_reward_tends_to_a_constant():
    """(1 - 1/(alpha L))^(L - 1) is exp(-1/alpha) but for terms of order 1/L."""
    n = 4000
    reward = np.zeros((1, n + 1))
    reward[0, n - 1] = 1
    e = experience_of([[True] * n + [False]], reward=reward, value=np.zeros((1, 1, n + 1)))
    first = jax.jit(GAE(length_alpha=0.4).__call__)(e).advantage_BT[0, 0]
    np.testing.assert_allclose(first, math.exp(-1 / 0.4), rtol=2e-3)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_alpha_is_positive(alpha):
    with pytest.raises(ValidationError, match="length_alpha"):
        GAE(length_alpha=alpha)
