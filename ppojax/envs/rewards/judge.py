"""A reward by a language model that is asked over HTTP."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ppojax.envs.rewards.part import Answered
from ppojax.envs.rewards.served import Served, ServedError
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


class JudgeError(ServedError):
    """The judge cannot be reached, or what it said holds no score."""


class Judge(Served):
    """The score that a language model gives, from 0 to 1, asked over the OpenAI chat completions API.

    The reply's last `score: N` counts, divided by `scale` and clipped to [0, 1]. An answer cannot write into the
    template's other fields, but it can try to talk the judge into a score, as with any judge.
    """

    key: ClassVar[str] = "judge"
    error: ClassVar[type[ServedError]] = JudgeError

    url: str = Field(description="base address of the API, such as http://localhost:8000/v1")
    prompt: str = Field(
        default=_PROMPT, description="user message; {question}, {answer} and {completion} are filled in"
    )
    scale: float = Field(default=10.0, gt=0, description="the reply's score that counts as 1")
    max_tokens: int = Field(default=512, ge=1, description="tokens of a reply, at most")

    @field_validator("prompt")
    @classmethod
    def _asks(cls, prompt: str) -> str:
        if "{completion}" not in prompt:
            raise ValueError("expected a text with {completion}")
        return prompt

    def __call__(self, answered: Answered) -> float:
        """Ask. Raises JudgeError."""
        filled = {
            "question": _question(answered.messages),
            "answer": str(answered.answer),
            "completion": answered.completion,
        }
        # In one pass: what a field says is never filled in again.
        text = re.sub(r"\{(question|answer|completion)\}", lambda found: filled[found[1]], self.prompt)
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": self.max_tokens, "temperature": 0.0}
        reply = self.ask("/chat/completions", body, _content)
        found = _SCORE.findall(reply)
        if not found:
            raise JudgeError(f'{self.url}: expected "score: N" in the reply, got {reply!r:.80}')
        return min(max(float(found[-1]) / self.scale, 0.0), 1.0)


def _content(reply: Any) -> str:
    """Read the text of a chat completion. Raises ValueError."""
    try:
        content: Any = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise ValueError(f"expected a chat completion, got {reply!r:.80}") from error
    if not isinstance(content, str):
        raise ValueError(f"expected a text as content, got {content!r:.80}")
    return content


def _question(messages: Messages) -> str:
    return next((m["content"] for m in messages if m["role"] == "user"), "")
