"""Processes that meet, disagree, do not come, and are lost; here each is a thread."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Timer

import pytest

from ppojax.errors import ConfigError, ExitCode, PeerError, PpojaxError
from ppojax.processes import meeting, start
from ppojax.processes.meeting import Line, Watch, meet
from ppojax.processes.resolve import Place
from ppojax.processes.settings import ProcessesConfig

Met = tuple[dict[int, Line], str] | PpojaxError


WATCHES: list[Watch] = []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def all_meet(said: Sequence[tuple[int, int, str]], timeout_s: int = 20) -> list[Met]:
    """Let processes with these indices, counts and configs meet."""
    where = f"127.0.0.1:{free_port()}"

    def one(index: int, count: int, config: str) -> Met:
        try:
            return meet(Place(where, count, index), ProcessesConfig(timeout_s=timeout_s), config)
        except PpojaxError as fault:
            return fault

    with ThreadPoolExecutor(len(said)) as pool:
        return list(pool.map(lambda arguments: one(*arguments), said))


@pytest.fixture(autouse=True)
def no_line_stays_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: list[Line] = []

    class Noted(Line):
        def __init__(self, connection: socket.socket) -> None:
            super().__init__(connection)
            made.append(self)

    monkeypatch.setattr(meeting, "Line", Noted)
    before = set(threading.enumerate())
    yield
    while WATCHES:
        WATCHES.pop()._ended.set()
    for line in made:
        line.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)


class Exits(list[int]):
    """The exit codes of processes that would have ended."""

    def until(self, count: int, seconds: float = 10.0) -> bool:
        """Wait for this many."""
        give_up = time.monotonic() + seconds
        while len(self) < count and time.monotonic() < give_up:
            time.sleep(0.01)
        return len(self) >= count


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exits]:
    codes = Exits()
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(meeting, "GRACE_S", 0.01)
    yield codes


def watches(count: int, heartbeat_s: float) -> tuple[list[Watch], list[tuple[int, int, str]]]:
    """A watch in each of `count` processes, and what they write down before they end."""
    lines = [met[0] for met in all_meet([(i, count, "") for i in range(count)]) if isinstance(met, tuple)]
    found = [Watch(Place("", count, index), mine, float(heartbeat_s)) for index, mine in enumerate(lines)]
    WATCHES.extend(found)
    ends: list[tuple[int, int, str]] = []
    for index, watch in enumerate(found):
        watch.on_end = lambda code, text, index=index: ends.append((index, code, text))
    return found, ends


def test_all_meet_and_learn_where_jax_will_be() -> None:
    met = all_meet([(2, 3, "a"), (0, 3, "a"), (1, 3, "a")])
    services = {found[1] for found in met if isinstance(found, tuple)}
    assert len(services) == 1 and services.pop().startswith("127.0.0.1:")
    assert [sorted(found[0]) for found in met if isinstance(found, tuple)] == [[0], [1, 2], [0]]


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ([(0, 2, ""), (1, 3, "")], "processes.count: process 0 says 2, process 1 says 3; start all with the same"),
        ([(0, 3, ""), (1, 3, ""), (1, 3, "")], "processes.index: two processes say that they are 1; give each its own"),
        ([(0, 2, "seed: 0\nsteps: 3"), (1, 2, "seed: 0\nsteps: 4")], "another config.*'steps: 4', not 'steps: 3'"),
    ],
)
def test_what_they_disagree_on_is_told_to_all(said: list[tuple[int, int, str]], text: str) -> None:
    for fault in all_meet(said):
        with pytest.raises(ConfigError, match=text):
            raise fault if isinstance(fault, PpojaxError) else AssertionError("met")


def test_who_never_comes_is_named() -> None:
    for fault in all_meet([(0, 4, ""), (2, 4, "")], timeout_s=1):
        with pytest.raises(PeerError, match=r"only 2 of 4 processes came within 1 s .*; missing: 1, 3: see"):
            raise fault if isinstance(fault, PpojaxError) else AssertionError("met")
    (alone,) = all_meet([(1, 2, "")], timeout_s=1)
    with pytest.raises(PeerError, match=r"process 0 did not answer at 127.0.0.1:\d+ within 1 s"):
        raise alone if isinstance(alone, PpojaxError) else AssertionError("met")
    assert PeerError.exit_code == ExitCode.WATCHDOG == 70


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = Place(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)
        with pytest.raises(ConfigError, match=r"process 0 cannot listen at port \d+: .*; choose another port"):
            meet(place, ProcessesConfig(timeout_s=1), "")


def test_a_lost_process_ends_the_others(exits: Exits) -> None:
    found, ends = watches(3, heartbeat_s=20)
    found[1]._ended.set()  # so that it stays quiet
    found[1].lines[0].close()
    assert exits.until(2)
    texts = {index: text for index, code, text in reversed(ends) if code == 70}  # what each said first
    assert texts[0].startswith("process 1 is gone, or has given no sign of life for 20 s")
    assert texts[2] == "process 1 ended with exit code 70: process 0 lost it"
    assert set(exits) == {70}


def test_a_silent_process_is_lost(exits: Exits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "_beat", lambda self: None)
    _, ends = watches(2, heartbeat_s=0.2)
    assert exits.until(2)
    # Either may be the first to see it, and the other may hear of it before it sees it.
    assert set(exits) == {70} and any("no sign of life for 0.2 s (processes.heartbeat_s)" in end[2] for end in ends)


def test_a_fault_of_one_is_the_fault_of_all(exits: Exits) -> None:
    found, ends = watches(3, heartbeat_s=20)
    found[2].end(3, "no episode could be started")
    assert exits.until(2)
    said = "process 2 ended with exit code 3: no episode could be started"
    assert sorted(ends) == [(0, 3, said), (1, 3, said)] and exits == [3, 3]


def test_those_that_end_together_end_by_themselves(exits: Exits) -> None:
    found, ends = watches(2, heartbeat_s=20)
    for watch in reversed(found):
        watch.end(75, "stopped")
    found[0].wait()
    found[1].wait()
    assert (ends, exits) == ([], [])


def test_a_call_that_fails_for_another_s_end_ends_with_its_code(
    exits: Exits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As process 0 in a collective with a process that raises: before its watch is done waiting."""
    monkeypatch.setattr(meeting, "GRACE_S", 20.0)
    here, there = (met for met in all_meet([(0, 2, ""), (1, 2, "")]) if isinstance(met, tuple))
    monkeypatch.setattr(start, "meet", lambda *_: here)
    monkeypatch.setattr(start, "_start_jax", lambda *_: None)
    with pytest.raises(RuntimeError), start.joined(Place("", 2, 0), ProcessesConfig(), "") as watch:
        assert watch is not None
        WATCHES.append(watch)
        watch.on_end = lambda code, text: exits.append(-code)  # the watch is not to be the one
        Timer(0.2, there[0][0].send, [{"end": 3, "index": 1, "reason": "no such file"}]).start()
        Timer(0.4, there[0][0].close).start()
        raise RuntimeError("connection closed by peer")
    assert exits[0] == 3 and -3 not in exits
    said = capsys.readouterr().err
    assert said.startswith("ppojax: error: process 1 ended with exit code 3: no such file\n")


def test_process_0_outlives_those_who_wait_for_their_own_end(exits: Exits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "GRACE_S", 0.3)
    found, _ = watches(2, heartbeat_s=20)
    found[0].end(3, "no such file")
    found[0].wait()
    assert exits == [3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_record_that_cannot_be_written_does_not_keep_a_process(exits: Exits) -> None:
    found, _ = watches(2, heartbeat_s=20)

    def full(code: int, text: str) -> None:
        raise OSError("disk full")

    found[0].on_end = full
    found[1].end(3, "no such file")
    assert exits.until(1) and exits == [3]
