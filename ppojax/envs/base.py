"""What an environment is: messages in and out, in the shapes of the OpenAI chat API. No jax here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ppojax.types import Messages


@dataclass(frozen=True)
class Task:
    """One thing to do. `data` is for the environment and the grader; the policy sees only messages."""

    id: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Reset:
    """How an episode starts: the prompt, and the JSON schemas of the tools that the chat template announces."""

    messages: Messages
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What follows an assistant message.

    `terminated`: the episode is over by its own rules, nothing can be earned any more. `truncated`: a limit from
    outside cut it, it would have gone on. `info` of the last step holds `success`.
    """

    messages: Messages
    reward: float
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Env(Protocol):
    """One episode at a time. An exception ends the episode as an error, out of the loss."""

    def reset(self, task: Task) -> Reset:
        """Start an episode."""
        ...

    def step(self, message: dict[str, Any]) -> Step:
        """Answer an assistant message."""
        ...

    def close(self) -> None:
        """Free what the episode held."""
        ...
