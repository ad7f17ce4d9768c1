"""What is read off the runs of an experiment: one number a run, and what its seeds say together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppojax.statistics import Estimate, estimate

WINDOW = 10  # steps of a mean over the end, or over any stretch of a run
FALLEN = 0.5  # of its best stretch: a run that ends lower has collapsed


@dataclass(frozen=True)
class Run:
    """One run as the experiment kept it."""

    method: str
    setting: str
    seed: int
    exit: int | None
    columns: Mapping[str, Sequence[float | None]]

    def series(self, name: str) -> np.ndarray:
        """A metric by step, NaN where it is not there."""
        steps = len(next(iter(self.columns.values()), ()))
        return np.array([np.nan if x is None else x for x in self.columns.get(name, [None] * steps)], float)


Measure = Callable[[Run], float]


def read(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """The head of a file of rows, and its runs."""
    head, *runs = (json.loads(line) for line in path.read_text().splitlines())
    return head, [Run(**run) for run in runs]


def stretches(x: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Means over each stretch of `window` steps, or over all where there are fewer."""
    window = min(window, len(x))
    return np.convolve(x, np.ones(window) / window, mode="valid")


def at_end(name: str, window: int = WINDOW) -> Measure:
    """The mean of a metric over the last steps."""
    return lambda run: float(np.mean(run.series(name)[-window:])) if run.columns else np.nan


def throughout(*names: str) -> Measure:
    """The mean over all steps of the first of these metrics that the run has."""

    def mean(run: Run) -> float:
        found = (x for x in map(run.series, names) if not np.isnan(x).all())
        return float(np.nanmean(next(found, np.array([np.nan]))))

    return mean


def collapsed(run: Run) -> float:
    """1 where the reward of the last stretch is below half of the best one's, or the run did not end well."""
    if not run.columns:
        return 1.0
    mean = stretches(run.series("reward/mean"))
    return float(run.exit != 0 or mean[-1] < FALLEN * mean.max())


def fell(run: Run) -> float:
    """1 where five steps somewhere are below half of the best five before them, whether it comes back or not."""
    if not run.columns:
        return 1.0
    mean = stretches(run.series("reward/mean"), 5)
    return float(np.any(mean < FALLEN * np.maximum.accumulate(mean)))


def over_seeds(runs: Sequence[Run], measure: Measure) -> Estimate:
    """Interquartile mean over the runs, with its bootstrap interval (95%)."""
    return estimate(np.array([measure(run) for run in runs]), np.zeros(len(runs), np.int64))


def text(e: Estimate, digits: int = 2) -> str:
    """Such as `.91 [.88, .93]`."""
    value, low, high = (None if x is None else f"{float(x):.{digits}f}" for x in e)
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def of(runs: Sequence[Run], method: str, setting: str) -> list[Run]:
    """The seeds of one method in one setting."""
    return [run for run in runs if run.method == method and run.setting == setting]
