"""A reward by a language model that is asked over HTTP."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ppojax.envs.rewards.part import Answered, Part
from ppojax.errors import ConfigError
from ppojax.types import Messages

_PROMPT = """Question:
{question}

Reference answer:
{answer}

Answer to judge:
{completion}

Is the answer to judge right? Explain in one sentence, then end with the line "score: N".
N goes from 0 (wrong) to 10 (right)."""
_SCORE = re.compile(r"score\W{0,5}(-?[0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)
_MAX_REPLY = 1_000_000  # bytes


class JudgeError(RuntimeError):
    """The judge cannot be reached, or what it said holds no score."""


class Judge(Part):
    """The score that a language model gives, from 0 to 1, asked over the OpenAI chat completions API.

    The reply's last `score: N` counts, divided by `scale` and clipped to [0, 1]. An answer cannot write into the
    template's other fields, but it can try to talk the judge into a score, as with any judge.
    """

    url: str = Field(description="base address of the API, such as http://localhost:8000/v1")
    model: str = Field(description="name of the model there")
    prompt: str = Field(
        default=_PROMPT, description="user message; {question}, {answer} and {completion} are filled in"
    )
    scale: float = Field(default=10.0, gt=0, description="the reply's score that counts as 1")
    max_tokens: int = Field(default=512, ge=1, description="tokens of a reply, at most")
    timeout_s: float = Field(default=20.0, gt=0, description="seconds that one try may take")
    tries: int = Field(default=2, ge=1, description="times a request is sent until it succeeds")
    key_file: str | None = Field(default=None, description="file that holds the API key")

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError("expected an address such as http://localhost:8000/v1")
        return url

    @field_validator("prompt")
    @classmethod
    def _asks(cls, prompt: str) -> str:
        if "{completion}" not in prompt:
            raise ValueError("expected a text with {completion}")
        return prompt

    def load(self) -> None:
        """Read the API key. Raises ConfigError."""
        _authorization(self.key_file)

    def __call__(self, answered: Answered) -> float:
        """Ask. Raises JudgeError."""
        filled = {
            "question": _question(answered.messages),
            "answer": str(answered.answer),
            "completion": answered.completion,
        }
        # In one pass: what a field says is never filled in again.
        text = re.sub(r"\{(question|answer|completion)\}", lambda found: filled[found[1]], self.prompt)
        reply = self._ask([{"role": "user", "content": text}])
        found = _SCORE.findall(reply)
        if not found:
            raise JudgeError(f'{self.url}: expected "score: N" in the reply, got {reply!r:.80}')
        return min(max(float(found[-1]) / self.scale, 0.0), 1.0)

    def _ask(self, messages: Messages) -> str:
        body = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0.0}
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **_authorization(self.key_file)},
        )
        for left in reversed(range(self.tries)):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return _content(response.read(_MAX_REPLY))
            except (OSError, ValueError) as error:  # URLError, HTTPError and time-outs are OSErrors
                refused = isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404)
                if not left or refused:
                    raise JudgeError(f"{self.url}: {error}") from error
            time.sleep(0.5)
        raise AssertionError("unreachable")


def _content(reply: bytes) -> str:
    """Read the text of a chat completion. Raises ValueError."""
    try:
        content: Any = json.loads(reply)["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise ValueError(f"expected a chat completion, got {reply!r:.80}") from error
    if not isinstance(content, str):
        raise ValueError(f"expected a text as content, got {content!r:.80}")
    return content


def _authorization(key_file: str | None) -> dict[str, str]:
    if key_file is None:
        return {}
    try:
        return {"Authorization": f"Bearer {Path(key_file).read_text(encoding='utf-8').strip()}"}
    except OSError as error:
        raise ConfigError(f"env.reward.judge.key_file={key_file}: cannot be read ({error.strerror})") from error


def _question(messages: Messages) -> str:
    return next((m["content"] for m in messages if m["role"] == "user"), "")
