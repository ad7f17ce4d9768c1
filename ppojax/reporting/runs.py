"""A run as a report reads it: its settings, its rows of metrics, and how it ended. Nothing in its folder is trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from ppojax.errors import ConfigError, DataError, ExitCode
from ppojax.runtime.metrics import read_metrics
from ppojax.runtime.rundir import RunDir

Axis = Literal["step", "tokens", "seconds"]


@dataclass(frozen=True)
class Run:
    """One run."""

    name: str  # its folder, as it was given
    folder: RunDir
    config: Mapping[str, Any]  # dotted key -> value; a section is its type, or null
    rows: Sequence[Mapping[str, float | int | None]]  # of metrics.jsonl
    code: int | None  # from exit.json; None while it goes on, or when it was killed
    reason: str

    @property
    def seed(self) -> object:
        """The seed of its config."""
        return self.config.get("seed")

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return self.code == ExitCode.DONE

    @cached_property
    def trained(self) -> Sequence[Mapping[str, float | int | None]]:
        """The rows of training steps: without the evaluation that opens a run."""
        return [row for row in self.rows if (row["step"] or 0) > 0]

    @property
    def steps(self) -> int:
        """The number of its last step."""
        return int(self.trained[-1]["step"] or 0) if self.trained else 0

    def column(self, name: str) -> np.ndarray:
        """A metric over the training steps; NaN where it was not logged or not finite."""
        return np.array([np.nan if row.get(name) is None else row[name] for row in self.trained], np.float64)

    def opening(self, name: str) -> float | int | None:
        """A metric before the first step, as of the evaluation that opens a run."""
        return self.rows[0].get(name) if self.rows and self.rows[0]["step"] == 0 else None

    def has(self, name: str) -> bool:
        """Whether this metric was ever logged."""
        return any(row.get(name) is not None for row in self.rows)

    def last(self, name: str) -> float | int | None:
        """The newest number of a metric, the evaluation before the first step included."""
        return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)

    def axis(self, name: Axis) -> np.ndarray:
        """Where each training step ends: its number, tokens since the start, or seconds of training."""
        if name == "step":
            return self.column("step")
        return np.cumsum(np.nan_to_num(self.column("perf/total_num_tokens"))) if name == "tokens" else self.seconds

    @cached_property
    def starts(self) -> np.ndarray:
        """Which rows are the first of a process: the first one, and where the count of compilations starts anew."""
        seconds, count = self.column("compile/seconds"), self.column("compile/count")
        first = np.zeros(len(seconds), bool)
        first[:1] = True
        first[1:] = (np.diff(seconds) < 0) | (np.diff(count) < 0)
        return first

    @cached_property
    def seconds(self) -> np.ndarray:
        """Seconds of training up to each step, without compilation as far as it can be told.

        `timing_s/step`, less what `compile/seconds` grew by in the step. What the first step of a process compiled
        cannot be told from what was compiled before it: it counts as the median of the others.
        """
        step, compiled = np.nan_to_num(self.column("timing_s/step")), self.column("compile/seconds")
        if np.isnan(compiled).any():
            return np.cumsum(step)
        step[1:] = np.maximum(step[1:] - np.maximum(np.diff(compiled), 0), 0)
        if not self.starts.all():
            step[self.starts] = np.median(step[~self.starts])
        return np.cumsum(step)

    @property
    def compiled(self) -> float | None:
        """Seconds of compilation, in all processes."""
        seconds = self.column("compile/seconds")
        if not len(seconds) or np.isnan(seconds).any():
            return None
        return float(seconds[-1] + seconds[:-1][self.starts[1:]].sum())

    def ending(self) -> str:
        """Say how it ended, and of what."""
        if self.done:
            return "done"
        planned = self.config.get("steps")
        at = f"after step {self.steps}" + (f" of {planned}" if isinstance(planned, int) else "")
        if self.code is None:
            return f"goes on or was killed, {at}"
        words: dict[int, str] = {
            ExitCode.DIVERGED: "diverged",
            ExitCode.PREEMPTED: "stopped",
            ExitCode.INTERRUPTED: "interrupted",
        }
        return f"{words.get(self.code, f'failed with code {self.code}')} {at}: {self.reason}"


def find_runs(text: str) -> list[Run]:
    """Read the runs that `runs=` names: folders and patterns, with commas between. A folder counts once.

    Raises ConfigError for what is no run, DataError for files of a run that cannot be read.
    """
    found: dict[Path, Run] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        names = sorted(glob(part)) if has_magic(part) and not Path(part).exists() else [part]
        folders = [RunDir(name) for name in names]
        if folders and names != [part]:  # of what a pattern finds, only runs are meant
            folders = [folder for folder in folders if folder.config.is_file()]
        if not folders:
            raise ConfigError(f"runs={part}: matches no run; give folders such as runs/quickstart")
        for folder in folders:
            found.setdefault(folder.path.resolve(), _read(folder))
    if not found:
        raise ConfigError("runs: names no run; give folders or patterns, as in runs=runs/ppo-*,runs/grpo-*")
    return list(found.values())


def _read(folder: RunDir) -> Run:
    if not folder.config.is_file():
        raise ConfigError(f"runs={folder.path}: there is no run (no {folder.config}); give the folder of one")
    try:
        code, reason = _read_exit(folder.exit) if folder.exit.is_file() else (None, "")
        if not folder.metrics.is_file():
            ended = f"; it ended with: {reason}" if reason else ""
            raise DataError(
                f"{folder.metrics}: is not there, so the run has done no step{ended}; leave it out of runs="
            )
        config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        rows = list(_checked(folder.metrics))
    except OSError as error:
        raise DataError(f"{folder.path}: cannot be read: {error.strerror}; check the run's folder") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{folder.config}: is no YAML, expected the settings of a run; copy it again") from error
    if not isinstance(config, dict):
        raise DataError(f"{folder.config}: holds no settings, expected keys and values; copy it again")
    return Run(str(folder.path), folder, flatten(config), rows, code, reason)


def _checked(path: Path) -> Iterator[Mapping[str, float | int | None]]:
    before = -1
    for number, row in enumerate(read_metrics(path), start=1):
        step = row.get("step")
        if type(step) is not int or step <= before:
            raise DataError(
                f"{path}: row {number} has the step {step}, expected one above {before}; mend or remove the line"
            )
        before = step
        yield row


def _read_exit(path: Path) -> tuple[int, str]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return int(record["code"]), str(record["reason"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path}: does not say how the run ended, expected code and reason; remove it") from error


def flatten(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Turn sections into dotted keys. A section itself stands for its type, so that variants can be told apart."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            out[key] = str(value.get("type", "set"))
            out |= flatten(value, f"{key}.")
        else:
            out[key] = value if isinstance(value, str | int | float | bool | None) else str(value)
    return out
