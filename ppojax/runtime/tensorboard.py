"""TensorBoard event files, a second sink that may fail without harm to the run.

Written through the record writer of tensorboardX: its `SummaryWriter` writes in a thread that a full disk ends
silently, and blocks for good once the queue of that thread is full.
"""

# Protobuf makes the classes of its modules at import.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

log = logging.getLogger(__name__)

SESSION_START = event_pb2.SessionLog(status=event_pb2.SessionLog.START)


class TensorBoard:
    """Write scalars to an event file in `folder`; a fault is warned of once, and the writer is off from then on.

    `resume_step` is the step a run goes on from, -1 for a new one: TensorBoard drops the events of later steps.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        self._writer: RecordWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            self._writer = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
            self._add(event_pb2.Event(file_version="brain.Event:2"))
            if resume_step >= 0:
                self._add(event_pb2.Event(step=resume_step + 1, session_log=SESSION_START))
        except OSError as error:
            self._give_up(error)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the scalars of `step`."""
        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        try:
            self._add(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _add(self, event: event_pb2.Event) -> None:
        if self._writer is None:
            return
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def _give_up(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            # Closing meets the same fault again: what is still buffered does not fit either.
            with suppress(OSError):
                writer.close()
        log.warning("%s: TensorBoard is off: %s; metrics.jsonl goes on", self._folder, error.strerror or error)
