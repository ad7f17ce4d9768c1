"""An endpoint on this machine that gives out the policy's tokens: for programs that ask a model over HTTP.

    POST {url}/inference/v1/generate   {"token_ids": [...], ...}   as vLLM has it, and the `renderers` package asks for
    GET  {url}/v1/models

Tokens go in and out: nothing is encoded or decoded here. Each episode has an address of its own with a secret in it.
Requests wait until the sampler has written the turn; what they say of sampling is not followed, for that is the run's.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, SimpleQueue
from typing import Any

MODEL = "policy"  # its name there
_GENERATE, _MODELS = "/inference/v1/generate", "/v1/models"
_MAX_BODY = 64 * 2**20  # bytes of a request
_MAX_ID = 2**31


class Asked:
    """A request for a turn behind `ids`, which somebody waits for."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self._reply: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def answer(self, ids: Sequence[int], logp: Sequence[float], finish_reason: str) -> None:
        """Send a turn: its tokens and their log-probabilities; `stop`, or `length` where it was cut."""
        content = [{"token": f"token_id:{i}", "logprob": float(p)} for i, p in zip(ids, logp, strict=True)]
        choice = {"index": 0, "token_ids": list(ids), "finish_reason": finish_reason, "logprobs": {"content": content}}
        self._reply.put({"request_id": secrets.token_hex(8), "choices": [choice]})

    def refuse(self) -> None:
        """Say that there will be no turn."""
        self._reply.put(None)

    def wait(self) -> dict[str, Any] | None:
        """Give the reply, once there is one."""
        return self._reply.get()


class Line:
    """The requests of one episode, and how it ended."""

    def __init__(self, endpoint: Endpoint, secret: str) -> None:
        self._endpoint, self._secret = endpoint, secret
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._waiting: Asked | None = None
        self._lock = threading.Lock()
        self.closed = False

    @property
    def url(self) -> str:
        """The address under which its requests arrive."""
        return f"{self._endpoint.url}/{self._secret}"

    def ask(self, ids: list[int]) -> dict[str, Any] | None:
        """Ask for a turn and wait for it; None where the episode is over."""
        asked = Asked(ids)
        with self._lock:
            if self.closed:
                return None
            self._events.put(asked)
        return asked.wait()

    def end(self, result: Any) -> None:
        """Say how the episode ended."""
        self._events.put(result)

    def next(self, timeout_s: float) -> Any:
        """Wait for the next request, an `Asked`, or for how the episode ended.

        Raises TimeoutError.
        """
        try:
            event = self._events.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError(f"no request within {timeout_s:g} s") from None
        self._waiting = event if isinstance(event, Asked) else None
        return event

    def close(self) -> None:
        """Refuse what is asked from now on, and what waits."""
        with self._lock:
            self.closed = True
        self._endpoint.lines.pop(self._secret, None)
        if self._waiting is not None:
            self._waiting.refuse()  # unread where it was answered
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, Asked):
                event.refuse()


class Endpoint:
    """The server, in threads of its own, reachable from this machine only."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        handler = type("OneEndpoint", (_Handler,), {"lines": self.lines})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True, name="endpoint").start()

    def open(self) -> Line:
        """Make an address for an episode."""
        secret = secrets.token_urlsafe(16)
        line = self.lines[secret] = Line(self, secret)
        return line


_starting = threading.Lock()


def endpoint() -> Endpoint:
    """The endpoint of this process, started when it is first asked for."""
    with _starting:
        return _endpoint()


@cache
def _endpoint() -> Endpoint:
    return Endpoint()


class _Handler(BaseHTTPRequestHandler):
    lines: dict[str, Line]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        line, route = self._line()
        if line is None or route != _MODELS:
            self._send(404, _fault("no such address"))
        else:
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        line, route = self._line()
        body = self._body()
        if line is None or route != _GENERATE:
            self._send(404, _fault("no such address"))
        elif body is None or not _are_ids(body.get("token_ids")):
            self._send(400, _fault("expected a JSON object with token_ids, a list of one or more token ids"))
        elif (reply := line.ask(body["token_ids"])) is None:
            self._send(410, _fault("the episode is over"))
        else:
            self._send(200, reply)

    def _line(self) -> tuple[Line | None, str]:
        secret, _, route = self.path.lstrip("/").partition("/")
        return self.lines.get(secret), f"/{route}"

    def _body(self) -> dict[str, Any] | None:
        length = self.headers.get("Content-Length") or ""
        if not length.isdecimal() or int(length) > _MAX_BODY:
            self.close_connection = True
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return None
        return body if isinstance(body, dict) else None

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # whoever asked has gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(i) is int and 0 <= i < _MAX_ID for i in ids)


def _fault(text: str) -> dict[str, Any]:
    return {"error": {"message": text}}
