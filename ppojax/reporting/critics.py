"""How good a run's values were, from its transcripts: by place in the row, by size, by what critics agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ppojax.errors import DataError
from ppojax.reporting.runs import Run
from ppojax.statistics import explained_variance
from ppojax.viewer.records import Numbers, Record, parse_record

PARTS = 5  # of a row
BINS = 8  # of values, of equal counts
BYTES = 3_000_000  # of transcripts that are read of a run, at most, beyond those of its last step


class Judged(NamedTuple):
    """One entry for each action of the episodes that did not fail."""

    returns: np.ndarray  # Monte-Carlo, over all rows of the episode, to its end
    values: np.ndarray  # mean over the critics
    spread: np.ndarray | None  # standard deviation over the critics
    part: np.ndarray  # of its row: 0 to PARTS - 1
    steps: int  # that were read

    def by_part(self) -> list[float]:
        """Explained variance of each part of a row."""
        return [explained_variance(self.returns[self.part == p], self.values[self.part == p]) for p in range(PARTS)]

    def calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean value and mean return of bins of values with about as many actions each."""
        return _bins(self.values, self.values, self.returns)

    def disagreement(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean deviation between critics, and the root mean square of return minus value, in bins of the former."""
        assert self.spread is not None
        x, square = _bins(self.spread, self.spread, (self.returns - self.values) ** 2)
        return x, np.sqrt(square)


def _bins(by: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of x and y in bins of equal counts; what is equal but for rounding shares a bin."""
    by = by.round(6)
    edges = np.unique(np.quantile(by, np.arange(1, BINS) / BINS))
    place = np.searchsorted(edges, by, side="right")
    kept = np.unique(place)
    x_mean, y_mean = (np.array([z[place == p].mean() for p in kept]) for z in (x, y))
    return x_mean, y_mean


def join(judged: Sequence[Judged]) -> Judged:
    """Put runs together."""
    returns, values, spreads, part, steps = zip(*judged, strict=True)
    known = [spread for spread in spreads if spread is not None]
    spread = np.concatenate(known) if len(known) == len(judged) else None
    return Judged(np.concatenate(returns), np.concatenate(values), spread, np.concatenate(part), sum(steps))


def judge(run: Run, steps: int) -> Judged | None:
    """Read the newest transcripts of a run, of up to `steps` steps; None where they hold no values.

    Raises DataError when a transcript cannot be read.
    """
    gamma = run.config.get("advantage.gamma")
    discount = float(gamma) if isinstance(gamma, int | float) else 1.0
    found, read, size = [], 0, 0
    for path in sorted(run.folder.rollouts.glob("step_*.jsonl"), reverse=True)[:steps]:
        if read and size + path.stat().st_size > BYTES:
            break
        read, size = read + 1, size + path.stat().st_size
        found += [seen for chain in _chains(path) if (seen := _judged(chain, discount)) is not None]
    return join(found)._replace(steps=read) if found else None


def _chains(path: Path) -> Iterator[Sequence[Record]]:
    """The rows of each episode, in order."""
    episodes: dict[int, list[Record]] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = parse_record(line, path, number)
                episodes.setdefault(record.episode, []).append(record)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the run's folder") from error
    for rows in episodes.values():
        yield sorted(rows, key=lambda record: record.segment)


def _judged(chain: Sequence[Record], gamma: float) -> Judged | None:
    if chain[-1].ending == "error" or any(not record.value for record in chain):
        return None
    rewards, values, parts = [], [], []
    for record in chain:
        action = np.array(record.action, bool)
        rewards.append(np.nan_to_num(_numbers(record.reward))[action])
        values.append(np.array([_numbers(value) for value in record.value or ()])[:, action])
        parts.append(np.arange(action.sum()) * PARTS // max(action.sum(), 1))
    value_MN = np.concatenate(values, axis=1)
    known = np.isfinite(value_MN).all(0)
    if not known.any():
        return None
    returns = to_go(np.concatenate(rewards), gamma)[known]
    spread = value_MN.std(0)[known] if len(value_MN) > 1 else None
    return Judged(returns, value_MN.mean(0)[known], spread, np.concatenate(parts)[known], 0)


def to_go(reward: np.ndarray, gamma: float) -> np.ndarray:
    """Monte-Carlo return from each action on: G_t = r_t + gamma G_next."""
    out, later = np.empty_like(reward), 0.0
    for t in reversed(range(len(reward))):
        out[t] = later = reward[t] + gamma * later
    return out


def _numbers(numbers: Numbers) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in numbers], np.float64)
