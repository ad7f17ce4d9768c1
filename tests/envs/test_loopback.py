"""The loopback endpoint, asked over HTTP as a program would."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ppojax.envs.loopback import MODEL, Asked, Line, endpoint


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def line() -> Iterator[Line]:
    line = endpoint().open()
    yield line
    line.close()


def post(url: str, body: Any, route: str = "/inference/v1/generate") -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + route, data)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_tokens_in_tokens_out(line: Line) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(post, line.url, {"model": MODEL, "token_ids": [5, 6], "sampling_params": {"n": 1}})
        asked = line.next(10.0)
        assert isinstance(asked, Asked) and asked.ids == [5, 6]
        asked.answer([7, 8], [-0.5, -1.25], "stop")
        status, reply = future.result()
    (choice,) = reply["choices"]
    assert (status, choice["token_ids"], choice["finish_reason"]) == (200, [7, 8], "stop")
    assert choice["logprobs"]["content"] == [
        {"token": "token_id:7", "logprob": -0.5},
        {"token": "token_id:8", "logprob": -1.25},
    ]
    with urllib.request.urlopen(f"{line.url}/v1/models", timeout=10) as response:
        assert [model["id"] for model in json.load(response)["data"]] == [MODEL]


def test_requests_of_several_episodes_stay_apart() -> None:
    lines = [endpoint().open() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(post, line.url, {"token_ids": [n]}) for n, line in enumerate(lines)]
        for n, line in reversed(list(enumerate(lines))):
            asked = line.next(10.0)
            assert asked.ids == [n]
            asked.answer([n + 10], [0.0], "length")
        assert [f.result()[1]["choices"][0]["token_ids"] for f in futures] == [[n + 10] for n in range(8)]
    for line in lines:
        line.close()


@pytest.mark.parametrize(
    "body",
    [b"{", b"[" * 100_000, [1], {}, *({"token_ids": ids} for ids in ([], [1.0], [True], [-1], [2**31], "12"))],
    ids=lambda body: str(body)[:20],
)
def test_what_is_no_request_is_refused(line: Line, body: Any) -> None:
    assert post(line.url, body) == (
        400,
        {"error": {"message": "expected a JSON object with token_ids, a list of one or more token ids"}},
    )


def test_addresses_that_do_not_exist(line: Line) -> None:
    known, generate = endpoint().url, "/inference/v1/generate"
    for url, route in ((known, generate), (f"{known}/guess", generate), (line.url, "/x")):
        assert post(url, {"token_ids": [1]}, route)[0] == 404
    with pytest.raises(TimeoutError, match=r"no request within 0\.01 s"):
        line.next(0.01)


def test_who_asks_too_late_is_sent_away(line: Line) -> None:
    """Requests that wait when the episode ends are answered too: those that were seen, and those that were not."""
    with ThreadPoolExecutor(2) as pool:
        seen = pool.submit(post, line.url, {"token_ids": [1]})
        line.next(10.0)
        unseen = pool.submit(post, line.url, {"token_ids": [2]})
        while line._events.empty():
            pass
        line.close()
        assert seen.result()[0] == unseen.result()[0] == 410
    assert post(line.url, {"token_ids": [3]})[0] == 404 and line.ask([1]) is None
