"""The metrics of a run: `metrics.jsonl`, the source of truth, and TensorBoard beside it."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import SupportsFloat

from ppojax.errors import CannotWriteError, DataError
from ppojax.runtime.tensorboard import TensorBoard

log = logging.getLogger(__name__)

MAX_FAILED_WRITES = 3


class MetricsLog:
    """Write one JSON object a step: `step`, `time` (Unix seconds), then flat slash-named floats.

    Each row is on the disk before `log` returns. A number that is not finite is written as null. Rows that a full
    disk refuses are kept and written with the next one; the third refusal in a row raises CannotWriteError.

    `resume_step` is the step of the checkpoint the run goes on from: later rows, and a last line that a crash tore,
    are taken away, so that the file ends up with the rows of an uninterrupted run. The default empties the file.
    Raises DataError when a line in the middle is not a row, CannotWriteError when the file cannot be opened.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None, *, resume_step: int = -1) -> None:
        self.path = path
        try:
            self._offset = _length_through(path, resume_step)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._file, self._offset)
            os.fsync(self._file)
        except OSError as error:
            raise CannotWriteError(f"{path}: cannot be written: {error.strerror}; choose a writable run.dir") from error
        self._waiting = b""
        self._failed = 0
        self._tensorboard = TensorBoard(tensorboard, resume_step) if tensorboard is not None else None

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Add the row of `step`, before the checkpoint of that step is saved.

        Raises CannotWriteError after three failed writes in a row.
        """
        assert "step" not in metrics and "time" not in metrics, "step and time are the row's own"
        row: dict[str, float | int | None] = {"step": step, "time": round(time.time(), 3)}
        numbers = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        row.update({name: finite.get(name) for name in numbers})
        self._waiting += (json.dumps(row, allow_nan=False) + "\n").encode()
        self._write()
        if self._tensorboard is not None:
            self._tensorboard.add(step, finite)

    def _write(self) -> None:
        try:
            written = 0
            while written < len(self._waiting):
                written += os.pwrite(self._file, self._waiting[written:], self._offset + written)
            os.fsync(self._file)
        except OSError as error:
            self._failed += 1
            if self._failed >= MAX_FAILED_WRITES:
                raise CannotWriteError(
                    f"{self.path}: cannot be written, {self._failed} times in a row: {error.strerror}; "
                    "free some space and use resume=true"
                ) from error
            log.warning("%s: a row is kept back: %s (%d in a row)", self.path, error.strerror, self._failed)
            return
        self._offset += len(self._waiting)
        self._waiting = b""
        self._failed = 0

    def close(self) -> None:
        """Write what was kept back, if it can be written now, and close."""
        if self._file < 0:
            return
        try:
            if self._waiting:
                self._write()
        finally:
            os.close(self._file)
            self._file = -1
            if self._tensorboard is not None:
                self._tensorboard.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _length_through(path: Path, resume_step: int) -> int:
    """Count the bytes of the rows up to and with `resume_step`."""
    if not path.exists() or resume_step < 0:
        return 0
    length = 0
    lines = path.read_bytes().split(b"\n")
    whole, torn = lines[:-1], lines[-1]
    for number, line in enumerate(whole, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError) as error:
            # A crash of the machine may leave a block of zeros that ends in a newline of a later write.
            if number == len(whole) and not torn:
                return length
            raise DataError(
                f"{path}:{number}: is not a row of metrics; mend or remove the line, or start another run.name"
            ) from error
        if step > resume_step:
            return length
        length += len(line) + 1
    return length


def read_metrics(path: Path) -> list[dict[str, float | int | None]]:
    """Read the rows of a `metrics.jsonl`, leaving out a torn last line. Raises DataError when another is no row."""
    lines = path.read_bytes().split(b"\n")
    return [_row(line, path, number) for number, line in enumerate(lines[:-1], start=1) if line]


def _row(line: bytes, path: Path, number: int) -> dict[str, float | int | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or any(type(x) not in (int, float, type(None)) for x in row.values()):
        raise DataError(
            f"{path}: is no list of metrics, expected one object a line, of numbers (see line {number}); "
            "mend or remove it"
        )
    return row
