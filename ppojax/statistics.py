"""Statistics of a few runs, after Agarwal et al. 2021 (arXiv 2108.13264): what their seeds say, and how surely."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MIN_RUNS = 3  # of a stratum: with fewer no interval is claimed
DRAWS = 2000  # of a bootstrap
LEVEL = 0.95  # of an interval


class Estimate(NamedTuple):
    """A number, or one for each point of a curve, with its interval where there is one."""

    value: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None


def interquartile_mean(x: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of the middle half: of n numbers the floor(n/4) smallest and the floor(n/4) largest are left out.

    The trimmed mean of arXiv 2108.13264, section 4.3. With fewer than four numbers it is the mean.
    """
    n = x.shape[axis]
    middle = slice(n // 4, n - n // 4)
    return np.asarray(np.moveaxis(np.sort(x, axis), axis, 0)[middle].mean(0))


def resample(stratum_N: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Draw runs with replacement, each within its own stratum: indices [draws, N]."""
    index_RN = np.empty((draws, len(stratum_N)), np.int64)
    for stratum in np.unique(stratum_N):
        members = np.flatnonzero(stratum_N == stratum)
        index_RN[:, members] = rng.choice(members, (draws, len(members)))
    return index_RN


def enough(stratum_N: np.ndarray) -> bool:
    """Tell whether every stratum has the runs that an interval needs."""
    return bool(np.unique(stratum_N, return_counts=True)[1].min(initial=len(stratum_N)) >= MIN_RUNS)


def estimate(x: np.ndarray, stratum_N: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Give the interquartile mean over runs, with its stratified bootstrap percentile interval (95%).

    Args:
        x: one number for each run, or a row of them, for which the same draws serve.
        stratum_N: the task of each run; runs are drawn within it.
        draws: of the bootstrap.
        seed: of the draws.

    There is no interval where a stratum has fewer than `MIN_RUNS` runs.
    """
    value = interquartile_mean(x)
    if not enough(stratum_N):
        return Estimate(value, None, None)
    index_RN = resample(stratum_N, draws, np.random.default_rng(seed))
    return _with_interval(value, interquartile_mean(x[index_RN], axis=1))


def probability_of_improvement(
    x_N: np.ndarray,
    y_M: np.ndarray,
    stratum_N: np.ndarray,
    stratum_M: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Give P(X > Y) + P(X = Y) / 2 for a run of X and one of Y on the same task, averaged over the tasks both have.

    The Mann-Whitney U statistic over the number of pairs (arXiv 2108.13264, section 4.3); both sides are drawn again
    for the interval. NaN where there is no task in common.
    """
    better_NM = (x_N[:, None] > y_M) + 0.5 * (x_N[:, None] == y_M)
    shared = np.intersect1d(stratum_N, stratum_M)
    of_x, of_y = np.isin(stratum_N, shared), np.isin(stratum_M, shared)
    if not len(shared):
        return Estimate(np.array(np.nan), None, None)

    def mean(better: np.ndarray) -> np.ndarray:
        blocks = (better[..., stratum_N == s, :][..., stratum_M == s] for s in shared)
        return np.asarray(np.mean([block.mean((-2, -1)) for block in blocks], axis=0))

    value = mean(better_NM)
    if not (enough(stratum_N[of_x]) and enough(stratum_M[of_y])):
        return Estimate(value, None, None)
    rng = np.random.default_rng(seed)
    index_RN, index_RM = resample(stratum_N, draws, rng), resample(stratum_M, draws, rng)
    return _with_interval(value, mean(better_NM[index_RN[:, :, None], index_RM[:, None, :]]))


def explained_variance(returns: np.ndarray, values: np.ndarray) -> float:
    """1 - Var[G - V] / Var[G]; NaN where returns do not vary."""
    if len(returns) == 0 or returns.var() <= 1e-8:
        return float("nan")
    return float(1 - (returns - values).var() / returns.var())


def _with_interval(value: np.ndarray, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Estimate(value, low, high)
