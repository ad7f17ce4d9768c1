"""Curves of several runs as one: the interquartile mean with its interval, as far as all of them have come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppojax.reporting.methods import Method
from ppojax.reporting.runs import Axis, Run
from ppojax.statistics import estimate

POINTS = 120  # of a curve, at most


class Curve(NamedTuple):
    """A method's curve over x; `low` and `high` where there is an interval."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    runs: Sequence[tuple[np.ndarray, np.ndarray]]  # each by itself


def make_curve(method: Method, metric: str, axis: Axis) -> Curve | None:
    """Put the runs of a method together; None where none of them logged the metric.

    The curve spans what all of the runs have in common: it does not go on with the runs that lasted longest. Between
    the places where a run logged the metric, it is interpolated.
    """
    own = method.only(lambda run: run.has(metric))
    if own is None:
        return None
    lines = [_points(run, metric, axis) for run in own.runs]
    x = _grid([x for x, _ in lines], axis)
    at = estimate(np.array([np.interp(x, *line) for line in lines]), own.stratum_N)
    return Curve(x, at.value, at.low, at.high, [thin(*line) for line in lines] if len(lines) > 1 else ())


def _points(run: Run, metric: str, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    x, y = run.axis(axis), run.column(metric)
    if (opening := run.opening(metric)) is not None:
        x, y = np.append(0.0, x), np.append(opening, y)
    known = np.isfinite(y)
    return x[known], y[known]


def _grid(lines: Sequence[np.ndarray], axis: Axis) -> np.ndarray:
    low, high = max(x[0] for x in lines), min(x[-1] for x in lines)
    if low > high:
        return np.zeros(0)
    inside = np.unique(np.concatenate([x[(x >= low) & (x <= high)] for x in lines]))
    return inside if axis == "step" and len(inside) <= POINTS else np.linspace(low, high, min(len(inside), POINTS))


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave `POINTS` points: means of stretches."""
    if len(x) <= POINTS:
        return x, y
    x_mean, y_mean = (np.array([part.mean() for part in np.array_split(line, POINTS)]) for line in (x, y))
    return x_mean, y_mean


def final(run: Run, metric: str, rows: int) -> float:
    """Mean of the last rows that logged a metric, as many as there are up to `rows`; NaN where none did."""
    y = run.column(metric)
    known = y[np.isfinite(y)]
    return float(known[-rows:].mean()) if len(known) else float("nan")
