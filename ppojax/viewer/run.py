"""The transcripts of a run: its steps, the episodes of a step, the tokens of an episode."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import NamedTuple

from ppojax.errors import DataError
from ppojax.runtime.metrics import read_metrics
from ppojax.runtime.rundir import RunDir
from ppojax.viewer.colours import Scale, ScaleSums
from ppojax.viewer.episode import Episode, make_episode, turns_of
from ppojax.viewer.records import Record, parse_record

_NAME = re.compile(r"step_(\d{6,})\.jsonl")


class StepEntry(NamedTuple):
    """A step that has transcripts."""

    step: int
    path: Path
    reward: float | None  # mean, from metrics.jsonl


class Place(NamedTuple):
    """Where a row is in its file."""

    segment: int
    line: int
    offset: int
    size: int


@dataclass(frozen=True)
class Summary:
    """What a list of episodes says of one."""

    group: int
    number: int
    ending: str
    error: str | None
    reward: float
    turns: int
    tokens: int
    text: str
    places: tuple[Place, ...]  # of its rows, in the order of their segments


def find_steps(run: str) -> list[StepEntry]:
    """List the steps of the run in folder `run` that have transcripts, in their order.

    Raises DataError when there is no run, no transcript, or `metrics.jsonl` is not what a run writes. Where that file
    is not there, mean rewards are None.
    """
    folder = RunDir(run)
    try:
        if not folder.path.is_dir():
            raise DataError(f"run={run}: there is no such folder; give the folder of a run, such as runs/quickstart")
        rewards = _rewards(folder.metrics)
        files = list(folder.rollouts.iterdir()) if folder.rollouts.is_dir() else []
    except OSError as error:
        raise _unreadable(Path(error.filename or run), error) from error
    named = [(int(found[1]), path) for path in files if (found := _NAME.fullmatch(path.name))]
    if not named:
        raise DataError(
            f"run={run}: there is no transcript in {folder.rollouts}, expected step_000001.jsonl and so on; "
            "a run writes the first when its first step is done"
        )
    return [StepEntry(step, path, rewards.get(step)) for step, path in sorted(named)]


def _rewards(path: Path) -> dict[int, float]:
    if not path.is_file():
        return {}
    try:
        found = [(row["step"], row.get("reward/mean")) for row in read_metrics(path)]
    except KeyError as error:
        raise DataError(f"{path}: is no list of metrics, expected one object a line; mend or remove it") from error
    return {step: float(reward) for step, reward in found if isinstance(step, int) and isinstance(reward, int | float)}


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}; check the run's folder")


class StepFile:
    """The transcripts of one step. Tokens are read again when an episode is opened: a step may hold millions."""

    def __init__(self, entry: StepEntry) -> None:
        """Read and check the whole file. Raises DataError."""
        self.step, self._path = entry.step, entry.path
        sums = ScaleSums()
        found: dict[int, Summary] = {}
        for place, record in self._records():
            sums.add(record)
            found[record.episode] = self._join(found.get(record.episode), _summary(record, place), place)
        if not found:
            raise DataError(f"{self._path}: is empty, expected a row for each episode; remove the file")
        self.episodes = tuple(found.values())
        self.scale: Scale = sums.scale()

    def episode(self, summary: Summary) -> Episode:
        """Read the tokens of one episode. Raises DataError when the file has changed since."""
        chain = []
        try:
            with self._path.open("rb") as file:
                for place in summary.places:
                    file.seek(place.offset)
                    chain.append(parse_record(file.read(place.size), self._path, place.line))
        except OSError as error:
            raise _unreadable(self._path, error) from error
        return make_episode(self.step, chain)

    def find(self, number: int) -> Summary:
        """Find an episode by its number. Raises DataError when there is none."""
        for summary in self.episodes:
            if summary.number == number:
                return summary
        numbers = [summary.number for summary in self.episodes]
        raise DataError(
            f"episode={number}: {self._path} has none of that number; it holds {len(numbers)}, "
            f"{min(numbers)} to {max(numbers)}"
        )

    def _records(self) -> Iterator[tuple[Place, Record]]:
        offset = 0
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    record = parse_record(line, self._path, number)
                    yield Place(record.segment, number, offset, len(line)), record
                    offset += len(line)
        except OSError as error:
            raise _unreadable(self._path, error) from error

    def _join(self, before: Summary | None, row: Summary, place: Place) -> Summary:
        """Add a row to what is known of its episode. The chain ends as its last segment does."""
        if before is None:
            return row
        if place.segment in {other.segment for other in before.places} or before.group != row.group:
            raise DataError(
                f"{self._path}:{place.line}: episode {row.number}, segment {place.segment}, group {row.group} "
                f"contradicts line {before.places[-1].line}: expected another segment of group {before.group}; "
                "remove the file"
            )
        last = row if place.segment > max(other.segment for other in before.places) else before
        return Summary(
            group=row.group,
            number=row.number,
            ending=last.ending,
            error=last.error,
            reward=before.reward + row.reward,
            turns=before.turns + row.turns,
            tokens=before.tokens + row.tokens,
            text=before.text + row.text,
            places=tuple(sorted((*before.places, place))),
        )


def _summary(record: Record, place: Place) -> Summary:
    return Summary(
        group=record.group,
        number=record.episode,
        ending=record.ending,
        error=record.error,
        reward=fsum(reward or 0.0 for reward in record.reward),
        turns=turns_of(record),
        tokens=len(record.token),
        text="".join(record.text),
        places=(place,),
    )
