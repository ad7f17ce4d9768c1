"""Statistics of runs against hand-worked numbers and brute force over every possible draw."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ppojax.statistics import (
    MIN_RUNS,
    enough,
    estimate,
    explained_variance,
    interquartile_mean,
    probability_of_improvement,
    resample,
)

ONE = np.zeros


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 3.0], 2.0),
        ([9.0, 0.0, 3.0], 4.0),  # three: the mean
        ([100.0, 2.0, 4.0, -50.0], 3.0),
        ([5.0, 1.0, 2.0, 30.0, 3.0], 10 / 3),  # five: one off at each end
        ([8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 4.5),  # eight: two off at each end
    ],
)
def test_interquartile_mean(numbers: list[float], expected: float) -> None:
    assert float(interquartile_mean(np.array(numbers))) == pytest.approx(expected, abs=1e-15)
    both = np.stack([np.array(numbers), -np.array(numbers)], axis=1)
    np.testing.assert_allclose(interquartile_mean(both), [expected, -expected], atol=1e-15)
    np.testing.assert_allclose(interquartile_mean(both.T, axis=1), [expected, -expected], atol=1e-15)


def test_runs_are_drawn_within_their_stratum() -> None:
    stratum = np.array([0, 1, 0, 1, 1])
    index = resample(stratum, 400, np.random.default_rng(0))
    assert index.shape == (400, 5) and (stratum[index] == stratum).all()
    assert all(set(index[:, n]) == set(np.flatnonzero(stratum == stratum[n])) for n in range(5))


def test_interval_is_that_of_all_draws() -> None:
    """Of three runs there are 27 draws; the bootstrap's quantiles are theirs."""
    x = np.array([0.0, 1.0, 4.0])
    every = np.array([np.mean(draw) for draw in product(x, repeat=3)])
    at = estimate(x, ONE(3), draws=20_000)
    assert float(at.value) == pytest.approx(5 / 3)
    assert at.low is not None and at.high is not None
    expected = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
    np.testing.assert_allclose([at.low, at.high], expected, atol=1e-12)


def test_strata_narrow_the_interval() -> None:
    """What differs between tasks only is no doubt: with it drawn too, the interval would be wide."""
    x = np.array([0.0, 0.0, 0.0, 10.0, 10.0, 10.0])
    at = estimate(x, np.array([0, 0, 0, 1, 1, 1]))
    assert [float(n) for n in at if n is not None] == [5.0, 5.0, 5.0]
    mixed = estimate(x, ONE(6))
    assert mixed.low is not None and float(mixed.low) < 2


def test_curves_are_drawn_run_by_run() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 3))
    whole = estimate(x, ONE(5), draws=300)
    assert whole.low is not None and whole.high is not None
    for t in range(3):
        alone = estimate(x[:, t], ONE(5), draws=300)
        assert (alone.value, alone.low, alone.high) == (whole.value[t], whole.low[t], whole.high[t])


def test_too_few_runs_have_no_interval() -> None:
    assert MIN_RUNS == 3
    assert estimate(np.array([0.0, 1.0]), ONE(2)).low is None
    assert estimate(np.arange(5.0), np.array([0, 0, 0, 1, 1])).high is None
    assert enough(ONE(3)) and not enough(ONE(0))
    few = probability_of_improvement(np.arange(3.0), np.arange(2.0), ONE(3), ONE(2))
    assert few.low is None and float(few.value) == pytest.approx((0.5 + 0 + 1 + 0.5 + 1 + 1) / 6)


def test_probability_of_improvement() -> None:
    x, y = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 2.5])
    # Pairs: 1 beats 0; 2 beats 0 and draws with 2; 3 beats all.
    at = probability_of_improvement(x, y, ONE(3), ONE(3), draws=20_000)
    assert float(at.value) == pytest.approx((1 + 1.5 + 3) / 9)

    def score(a: tuple, b: tuple) -> float:
        return float(np.mean([(p > q) + 0.5 * (p == q) for p in a for q in b]))

    every = [score(a, b) for a in product(x, repeat=3) for b in product(y, repeat=3)]
    expected = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
    np.testing.assert_allclose([at.low, at.high], expected, atol=0.03)
    back = probability_of_improvement(y, x, ONE(3), ONE(3))
    assert float(back.value) == pytest.approx(1 - float(at.value))


def test_probability_of_improvement_compares_within_tasks() -> None:
    x, y = np.array([1.0, 100.0]), np.array([0.0, 200.0, 7.0])
    both = probability_of_improvement(x, y, np.array([0, 1]), np.array([0, 1, 2]))
    assert float(both.value) == 0.5  # better on task 0, worse on task 1; task 2 is y's alone
    assert np.isnan(probability_of_improvement(x, y, np.array([0, 0]), np.array([1, 1, 1])).value)


def test_explained_variance() -> None:
    returns = np.array([0.0, 1.0, 2.0, 5.0])
    assert explained_variance(returns, returns + 3) == 1.0  # a constant off is not variance
    assert explained_variance(returns, np.zeros(4)) == 0.0
    assert explained_variance(returns, -returns) == pytest.approx(-3.0)
    assert np.isnan(explained_variance(np.ones(4), returns)) and np.isnan(explained_variance(ONE(0), ONE(0)))
