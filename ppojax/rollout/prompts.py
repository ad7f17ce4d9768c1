"""Prompts as tokens, and what becomes of those that are over the limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ppojax.envs import Reset, Step, Task
from ppojax.errors import DataError
from ppojax.models.tokenizer import Tokenizer
from ppojax.types import Messages

LongPrompts = Literal["error", "drop", "truncate"]


class LongPromptError(DataError):
    """A prompt is over the limit, and the run is to end."""


class LongPrompt(Exception):
    """A prompt is over the limit, and its episodes are to fail. Its name is that of their error."""


class Prompt(NamedTuple):
    """How an episode starts."""

    ids: list[int]
    messages: Messages  # that `ids` say
    cut: bool  # they are not all that the environment said


@dataclass(frozen=True)
class PromptLimit:
    """How long prompts may be, and what is done with longer ones."""

    tokens: int | None = None  # rollout.max_prompt_tokens
    policy: LongPrompts = "error"

    def render(self, tokenizer: Tokenizer, task: Task, reset: Reset, room: int) -> Prompt:
        """Write how an episode starts as tokens, at most `room` of them.

        With `truncate` the longest message loses its middle, so that the template's own tokens stay.

        Raises:
            LongPromptError: the prompt is too long, and the policy is `error`.
            LongPrompt: it is too long, and the policy is `drop`, or no cut of one message is enough.
            DataError: the messages cannot be written with this template and vocabulary.
            TypeError, ValueError: see `check_messages`.
        """
        check_messages(reset.messages)
        limit = room if self.tokens is None else min(self.tokens, room)
        least = tokenizer.at_least(reset.messages)
        if reset.ids is not None:
            ids = check_ids(reset.ids, tokenizer)
        else:  # a text of a million characters is refused without being encoded
            ids = tokenizer.render(reset.messages, reset.tools) if least <= limit else None
        if ids is not None and len(ids) <= limit:
            return Prompt(ids, list(reset.messages), cut=False)
        if self.policy == "truncate" and reset.ids is None:
            cut = _cut(tokenizer, reset, limit)
            if cut is not None:
                return cut
        said = f"task {task.id}: its prompt has {f'over {least}' if ids is None else len(ids)} tokens, "
        if limit < room:
            said += f"rollout.max_prompt_tokens allows {limit}: raise rollout.max_prompt_tokens"
        else:
            said += f"rollout.max_tokens leaves room for {limit}: raise rollout.max_tokens"
        if self.policy == "error":
            raise LongPromptError(f"{said}, shorten the task, or set rollout.long_prompts=drop or truncate")
        raise LongPrompt(said)


def answer_ids(tokenizer: Tokenizer, step: Step, *, ended: bool, room: int) -> list[int] | None:
    """Write what an environment answers as tokens; None where it is too long for `room` tokens to be looked at.

    `ended` as in `Tokenizer.suffix`. Raises what `Tokenizer.suffix` and `check_ids` raise.
    """
    if step.ids is not None:
        return check_ids(step.ids, tokenizer)
    # A text of a million characters is not encoded to find that no row can hold it.
    return tokenizer.suffix(step.messages, ended=ended) if tokenizer.at_least(step.messages) < room else None


ANY_THAT_FITS = PromptLimit()


def check_messages(messages: Any) -> None:
    """Check what an environment says. Raises TypeError or ValueError where it is not a list of messages in JSON."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise TypeError(f"expected a list of messages with role and content, got {messages!r:.80}")
    json.dumps(messages, allow_nan=False)


def check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Check tokens that an environment wrote itself. Raises ValueError."""
    if wrong := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise ValueError(f"token {wrong[0]}, expected ids of this model's tokenizer, 0 to {tokenizer.vocab_size - 1}")
    return list(ids)


def _cut(tokenizer: Tokenizer, reset: Reset, limit: int) -> Prompt | None:
    """Leave out the middle of the longest message, as little as possible; None where all of it is not enough."""
    texts = [m["content"] if isinstance(m.get("content"), str) else "" for m in reset.messages]
    n = max(range(len(texts)), key=lambda n: len(texts[n]))
    found, low, high = None, 0, min(len(texts[n]), limit * tokenizer.longest)  # characters that may be kept
    while low <= high:
        kept = (low + high) // 2
        short = texts[n][: kept - kept // 2] + texts[n][len(texts[n]) - kept // 2 :]
        messages = [*reset.messages[:n], reset.messages[n] | {"content": short}, *reset.messages[n + 1 :]]
        ids = tokenizer.render(messages, reset.tools) if tokenizer.at_least(messages) <= limit else None
        if ids is not None and len(ids) <= limit:
            found, low = Prompt(ids, messages, cut=True), kept + 1
        else:
            high = kept - 1
    return found
