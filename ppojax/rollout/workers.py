"""Threads that run environments while the sampler goes on: bounded, with a time limit for each call.

A thread cannot be stopped from outside. One whose call takes too long is left behind: its result is dropped, what it
held is let go when it returns, another thread takes its place, and it does not keep the process alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any
from weakref import WeakSet

from ppojax.errors import DataError

LEFT_BEHIND_MOST = 64  # threads of a process that may be stuck
PROMPT_S = 0.05  # an answer that is due within this time is waited for
PATIENCE_S = 0.1  # such waiting in all: this, and a share of the time that has passed
PATIENCE_SHARE = 0.02
POLL_S = 0.1  # between looks at whether anybody still waits for the episodes
_left_behind: WeakSet[threading.Thread] = WeakSet()


class AbandonedError(Exception):
    """Nobody waits for the episodes any more."""


@dataclass(eq=False)
class Job:
    """One call, and what became of it."""

    call: Callable[[], Any]
    let_go: Callable[[], None] | None  # what follows a call that nobody waits for any more
    submitted: float
    patient: bool  # as long as it may be a prompt one, it is waited for
    result: Any = None
    error: BaseException | None = None
    began: float | None = None
    took_s: float = 0.0
    thread: threading.Thread | None = None
    _ended: bool = False
    left: bool = False  # nobody waits for it any more
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> bool:
        """Make the call, if somebody still waits for it; say whether the thread is not left behind."""
        with self._lock:
            self.thread, self.began = threading.current_thread(), time.monotonic()
            unwanted = self.left
        if not unwanted:
            try:
                self.result = self.call()
            except KeyboardInterrupt:  # of the caller's own thread
                raise
            except BaseException as error:  # a user's code: even `sys.exit` ends its own episode only
                self.error = error
        with self._lock:
            self._ended, self.took_s = True, time.monotonic() - self.began
        if self.left and self.let_go is not None:
            self.let_go()
        return unwanted or not self.left

    def leave(self) -> bool:
        """Stop waiting for the call, unless it has just ended."""
        with self._lock:
            self.left = not self._ended
        return self.left


class Workers:
    """Runs calls in at most `count` threads at a time; with 0 at once, in the thread that asks, without a limit.

    Once `abandoned` is set, `ended` raises AbandonedError, at once where it waits.
    """

    def __init__(self, count: int, timeout_s: float | None, abandoned: threading.Event | None = None) -> None:
        self._count, self._timeout_s = count, timeout_s
        self._abandoned = threading.Event() if abandoned is None else abandoned
        self._todo: SimpleQueue[Job | None] = SimpleQueue()
        self._done: SimpleQueue[Job] = SimpleQueue()
        self._open: dict[Job, None] = {}  # in the order of submission
        self._threads = 0
        self._patience, self._asked = PATIENCE_S, time.monotonic()
        self.waited_s = 0.0  # with nothing else to do

    def submit(self, call: Callable[[], Any], let_go: Callable[[], None] | None, patient: bool = True) -> Job:
        """Queue a call."""
        job = Job(call, let_go, time.monotonic(), patient)
        self._open[job] = None
        if self._count == 0:
            job.run()
            self._done.put(job)
            return job
        if self._threads < min(self._count, len(self._open)):
            self._start()
        self._todo.put(job)
        return job

    def _start(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, daemon=True, name="environment").start()

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            if not job.run():
                return
            self._done.put(job)

    def ended(self, idle: bool) -> list[Job]:
        """Jobs that have ended since the last time, by themselves or by the limit, in the order of submission.

        Prompt answers are waited for, so that rows which stop together go on together whatever the clock does; the
        slow ones are not, unless the caller is idle: then at least one answer is. What is waited is a bounded share
        of the time that passes.

        Raises:
            DataError: too many calls are stuck.
            AbandonedError: see the class.
        """
        if self._abandoned.is_set():
            raise AbandonedError
        start = time.monotonic()
        self._patience = min(self._patience + PATIENCE_SHARE * (start - self._asked), PATIENCE_S)
        found: set[Job] = set()
        while len(found) < len(self._open):
            forced, begin = idle and not found, time.monotonic()
            limit = self._next_limit() if forced else self._prompt_for(found)
            try:
                job = self._done.get(timeout=limit) if limit > 0 else self._done.get_nowait()
                found |= {job} & self._open.keys()
            except Empty:
                found |= self._overdue()
                if self._abandoned.is_set():
                    raise AbandonedError from None
                if not forced:
                    break
            finally:
                if forced:
                    self.waited_s += time.monotonic() - begin
                else:
                    self._patience -= time.monotonic() - begin
        self._asked = time.monotonic()
        out = [job for job in self._open if job in found]
        for job in out:
            del self._open[job]
        return out

    def _prompt_for(self, found: set[Job]) -> float:
        """Seconds that the newest call is still waited for."""
        newest = next((job for job in reversed(self._open) if job.patient and job not in found), None)
        return 0.0 if newest is None else min(newest.submitted + PROMPT_S - time.monotonic(), self._patience)

    def _next_limit(self) -> float:
        """Seconds until the next call may be overdue, or it is time to look around."""
        if self._timeout_s is None:
            return POLL_S
        began = [job.began for job in self._open if job.began is not None]
        left = min(began, default=time.monotonic()) + self._timeout_s - time.monotonic()
        return min(max(left, 0.001), POLL_S)

    def _overdue(self) -> set[Job]:
        """Leave calls behind that have taken too long."""
        now, found = time.monotonic(), set()
        for job in self._open:
            if self._timeout_s is None or job.began is None or now - job.began < self._timeout_s:
                continue
            if job.leave():
                self._leave(job)
                job.error = TimeoutError(f"over {self._timeout_s} s")
                found.add(job)
        return found

    def _leave(self, job: Job) -> None:
        assert job.thread is not None
        _left_behind.add(job.thread)
        self._threads -= 1
        stuck = sum(thread.is_alive() for thread in _left_behind)
        if stuck > LEFT_BEHIND_MOST:
            raise DataError(
                f"env: {stuck} calls of environments have hung for over rollout.env_timeout_s={self._timeout_s}: "
                f"give the environment a time limit of its own, or raise rollout.env_timeout_s"
            )
        self._start()

    def close(self, wait: bool) -> None:
        """Send the threads home; calls that are still open are waited for, or end by themselves."""
        while self._open and wait:
            self.ended(idle=True)
        for job in self._open:
            if job.let_go is not None:
                job.leave()
        for _ in range(self._threads):
            self._todo.put(None)
