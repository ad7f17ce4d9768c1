"""Stopping a run from outside: the first signal asks, the second one ends it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType, TracebackType

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SHOW_CURSOR = b"\x1b[?25h"


class StopSignals:
    """Turn SIGTERM and SIGINT into a flag that the loop polls; a second signal ends the process at once.

    The second signal exits with 128 + its number (143, 130) through `os._exit`: no `finally` runs and no half-written
    checkpoint is named as a whole one. A thread reads the signals from a pipe, because a Python handler would wait
    until the device call in progress returns. Leaving the block restores the former handlers. Outside the main thread,
    where Python allows no handlers, the block does nothing.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._former: dict[signal.Signals, object] = {}
        self._former_wakeup = -1
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def should_stop(self) -> bool:
        """Say whether a signal has arrived."""
        return self._received is not None

    def received(self) -> str | None:
        """Name the first signal; None before it."""
        return self._received.name if self._received is not None else None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._thread = threading.Thread(target=self._watch, args=(self._pipe[0],), name="stop-signals", daemon=True)
        self._thread.start()
        self._former_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, _leave_it_to_the_thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None or self._thread is None:
            return
        signal.set_wakeup_fd(self._former_wakeup)
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)
        self._pipe = self._thread = None

    def _watch(self, source: int) -> None:
        while True:
            byte = os.read(source, 1)
            if byte in (b"", b"\0"):
                return
            if byte[0] not in STOP_SIGNALS:
                continue
            number = signal.Signals(byte[0])
            if self._received is not None:
                _exit_now(number)
            self._received = number
            log.warning("%s: stopping at the next safe point; a second signal stops at once", number.name)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: Python must own the signal for its number to reach the pipe."""


def _exit_now(number: signal.Signals) -> None:
    if sys.stdout.isatty():
        os.write(1, SHOW_CURSOR)
    os.write(2, f"{number.name} again: stopped without saving\n".encode())
    os._exit(128 + number)
