"""Processes meet before jax starts, and know of each other's end afterwards.

Process 0 listens at `processes.coordinator`; the others connect and say who they are. Those lines stay open: an end is
told over them, and a line that breaks or falls silent is a process that was lost. This is ours, and not jax's service,
because that aborts the process (exit code 134) where we want one line that names who is missing.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ppojax.errors import ConfigError, ExitCode, PeerEnded, PeerError
from ppojax.processes.resolve import Place
from ppojax.processes.settings import ProcessesConfig

Message = dict[str, Any]
LONGEST = 1 << 20  # bytes of a message
RETRY_S = 0.1
GRACE_S = 10.0  # in which a process that another's end concerns may end by itself, with the same fault
MARGIN_S = 5.0  # that process 0 waits longer: jax's service is in it, and aborts those whom it leaves
NEWS_S = 3.0  # a collective fails as soon as a process is gone, which the watch then knows a moment later


class Line:
    """Messages between two processes, a line of JSON each. A read ends with None where the other one is gone."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._file, self._lock = connection, connection.makefile("rb"), threading.Lock()

    def send(self, message: Message) -> None:
        """Send; to a process that is gone, in vain: reading tells."""
        try:
            with self._lock:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def read(self, timeout_s: float) -> Message | None:
        """Wait for the next message; None where none comes in time, or what comes is none of ours."""
        try:
            self._socket.settimeout(timeout_s)
            message = json.loads(self._file.readline(LONGEST))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """Break the line, also for a thread that reads from it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._file.close()


def meet(place: Place, settings: ProcessesConfig, config: str) -> tuple[dict[int, Line], str]:
    """Wait until all are there, and find that they agree on how many they are and on the config.

    Returns:
        Lines to the others (process 0), or to process 0, by their number; the address of jax's own service.

    Raises:
        PeerError: not all came within `timeout_s`; the line names those who did not.
        ConfigError: two say that they are the same one, or their counts or configs differ.
    """
    host, port = place.coordinator.rsplit(":", 1)
    hello = {"index": place.index, "count": place.count, "config": config}
    if place.index == 0:
        return _gather(host.strip("[]"), int(port), place, settings.timeout_s, hello)
    line = _connect(host.strip("[]"), int(port), settings.timeout_s, place)
    line.send(hello)
    answer = line.read(settings.timeout_s + GRACE_S)
    if answer is None or "refused" in answer:
        line.close()
    if answer is None:
        raise PeerError(f"process {place.index}: process 0 ended while it waited for the others: see its output")
    if "refused" in answer:
        raise (PeerError if answer["missing"] else ConfigError)(str(answer["refused"]))
    return {0: line}, f"{host}:{answer['port']}"


def _connect(host: str, port: int, timeout_s: int, place: Place) -> Line:
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            return Line(socket.create_connection((host, port), timeout=max(1.0, give_up - time.monotonic())))
        except OSError as error:
            if time.monotonic() > give_up:
                raise PeerError(
                    f"process {place.index}: process 0 did not answer at {place.coordinator} within {timeout_s} s "
                    f"({error.strerror or error}): is it running, and is processes.coordinator its machine?"
                ) from error
            time.sleep(RETRY_S)


def _gather(host: str, port: int, place: Place, timeout_s: int, mine: Message) -> tuple[dict[int, Line], str]:
    lines: dict[int, Line] = {}
    faults: list[str] = []
    give_up = time.monotonic() + timeout_s
    with _listen(host, port) as listener:
        while len(lines) < place.count - 1 and not faults and (left := give_up - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                line = Line(listener.accept()[0])
            except TimeoutError:
                break
            hello = line.read(GRACE_S)
            if hello is None:  # a port scan, or one that died
                line.close()
                continue
            fault = _disagree(mine, hello, lines)
            faults += [fault] if fault else []
            lines[-1 if fault else hello["index"]] = line
    if faults or len(lines) < place.count - 1:
        missing = sorted(set(range(1, place.count)) - set(lines))
        text = (
            faults[0]
            if faults
            else (
                f"only {len(lines) + 1} of {place.count} processes came within {timeout_s} s (processes.timeout_s); "
                f"missing: {', '.join(map(str, missing))}: see their output, or whether they reach {place.coordinator}"
            )
        )
        for line in lines.values():
            line.send({"refused": text, "missing": not faults})
            line.close()
        raise (ConfigError if faults else PeerError)(text)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind(("", 0))
        service = free.getsockname()[1]
    for line in lines.values():
        line.send({"port": service})
    return lines, f"{place.coordinator.rsplit(':', 1)[0]}:{service}"


def _listen(host: str, port: int) -> socket.socket:
    """Listen to this machine where nobody else is meant, and to all that can reach it otherwise."""
    try:
        if host in ("127.0.0.1", "localhost"):
            return socket.create_server(("127.0.0.1", port))
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"processes.coordinator: process 0 cannot listen at port {port}: {error.strerror}; choose another port"
        ) from error


def _disagree(mine: Message, other: Message, known: Mapping[int, Line]) -> str | None:
    count, index = other.get("count"), other.get("index")
    if count != mine["count"]:
        return f"processes.count: process 0 says {mine['count']}, process {index} says {count}; start all with the same"
    if type(index) is not int or not 0 < index < mine["count"] or index in known:
        return f"processes.index: two processes say that they are {index}; give each its own number"
    if other.get("config") != mine["config"]:
        pairs = zip(mine["config"].splitlines(), str(other.get("config")).splitlines(), strict=False)
        here, there = next((pair for pair in pairs if pair[0] != pair[1]), ("fewer keys", "more keys"))
        return (
            f"process {index} has another config than process 0: {there.strip()!r}, not {here.strip()!r}; start all "
            "with the same arguments"
        )
    return None


class Watch:
    """Ends this process where another one has ended or was lost, even out of a call that never returns.

    `on_end(code, reason)` is called before, for what should still be written down.
    """

    def __init__(self, place: Place, lines: Mapping[int, Line], heartbeat_s: float) -> None:
        self.place, self.lines, self.heartbeat_s = place, lines, heartbeat_s
        self.on_end: Callable[[int, str], None] | None = None
        self._ended = threading.Event()
        self._first = threading.Lock()  # whoever ends the process keeps it
        self._heard = threading.Event()
        self._other: PeerEnded | None = None
        self._patience_s = NEWS_S
        self._readers = [threading.Thread(target=self._read, args=one, daemon=True) for one in lines.items()]
        for thread in (*self._readers, threading.Thread(target=self._beat, daemon=True)):
            thread.start()

    def end(self, code: int, reason: str) -> None:
        """Tell the others that this process ends, and with what."""
        self._ended.set()
        self._tell({"end": code, "index": self.place.index, "reason": reason})

    def cause(self) -> PeerEnded | None:
        """The end of another process, of which a fault that is not known here may be the consequence.

        Waits a moment for that news, but for one fault only.
        """
        self._heard.wait(self._patience_s)
        self._patience_s = 0.0
        return self._other

    def wait(self) -> None:
        """Wait until the others have ended too: jax aborts processes that outlive process 0."""
        give_up = time.monotonic() + GRACE_S + MARGIN_S
        for thread in self._readers:
            thread.join(max(0.0, give_up - time.monotonic()))

    def _tell(self, message: Message) -> None:
        for line in self.lines.values():
            line.send(message)

    def _beat(self) -> None:
        while not self._ended.wait(self.heartbeat_s / 4):
            self._tell({"beat": 1})

    def _read(self, number: int, line: Line) -> None:
        while (message := line.read(self.heartbeat_s)) is not None:
            if "end" in message:
                code, who = int(message["end"]), int(message["index"])
                if code == ExitCode.DONE:
                    break
                if self.place.index == 0:
                    self._tell(message)
                grace_s = 0.0 if code == ExitCode.WATCHDOG else GRACE_S
                self._exit(code, f"process {who} ended with exit code {code}: {message['reason']}", grace_s)
                break
        else:
            self._lost(number)
        line.close()

    def _lost(self, number: int) -> None:
        if self._ended.is_set():
            return
        text = (
            f"process {number} is gone, or has given no sign of life for {self.heartbeat_s:g} s (processes.heartbeat_s)"
        )
        if self.place.index == 0:
            self._tell({"end": int(ExitCode.WATCHDOG), "index": number, "reason": "process 0 lost it"})
        self._exit(ExitCode.WATCHDOG, f"{text}; resume=true goes on from the last checkpoint", 0.0)

    def _exit(self, code: int, text: str, grace_s: float) -> None:
        if not self._heard.is_set():
            self._other = PeerEnded(text, code)
            self._heard.set()
        with self._first:
            if self._ended.wait(grace_s):
                return
            self._ended.set()  # what is seen from now on is of the same end
            try:
                if self.on_end is not None:
                    self.on_end(code, text)
                sys.stdout.flush()
                os.write(2, f"ppojax: error: {text}\n".encode())
            finally:  # a disk or a pipe that is gone must not keep it
                os._exit(code)
