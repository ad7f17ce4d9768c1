"""What an environment is: messages in and out, in the shapes of the OpenAI chat API. No jax here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, overload, runtime_checkable

from ppojax.component import Component
from ppojax.types import Messages

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Task:
    """One thing to do. `data` is for the environment and the grader; the policy sees only messages."""

    id: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Reset:
    """How an episode starts: the prompt, and the JSON schemas of the tools that the chat template announces.

    `privileged` is shown to the critics alone, and only where `critic.privileged` asks for it. `ids` is the prompt as
    tokens, from an environment that writes them itself; messages are then for people only.
    """

    messages: Messages
    tools: list[dict[str, Any]] = field(default_factory=list)
    privileged: str = ""  # what the policy must not know and a critic may: the answer, a rubric, the best moves
    ids: list[int] | None = None


@dataclass(frozen=True)
class Step:
    """What follows an assistant message.

    `terminated`: the episode is over by its own rules, nothing can be earned any more. `truncated`: a limit from
    outside cut it, it would have gone on. `info` of the last step holds `success`. `ids` are the tokens that follow the
    turn, as in `Reset`; where they are `fresh` they are a whole prompt, with which the episode goes on in another row.
    """

    messages: Messages
    reward: float
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    ids: list[int] | None = None
    fresh: bool = False


@runtime_checkable
class Env(Protocol):
    """One episode at a time. An exception ends the episode as an error, out of the loss."""

    def reset(self, task: Task) -> Reset:
        """Start an episode."""
        ...

    def step(self, message: dict[str, Any]) -> Step:
        """Answer an assistant message: its role, its content, and `tokens`, how many the policy wrote for it.

        Where the settings say `writes_tokens` also `token_ids`, `logp`, and `finish_reason` (`stop`, or `length`).
        Called in a thread of its own with `rollout.workers`, so that what waits for others (a judge, a tool) does not
        hold up the sampler.
        """
        ...

    def close(self) -> None:
        """Free what the episode held."""
        ...


class TasksByNumber(Sequence[Task]):
    """Tasks that are made when they are asked for."""

    def __init__(self, make: Callable[[int], Task], numbers: range) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> TasksByNumber: ...
    def __getitem__(self, index: int | slice) -> Task | TasksByNumber:
        if isinstance(index, slice):
            return TasksByNumber(self._make, self._numbers[index])
        return self._make(self._numbers[index])


def split_of(content: str) -> Split:
    """Tell to which split a task belongs by what it asks: one in eight is held out, whatever the seed."""
    digest = hashlib.blake2b(content.encode(), digest_size=4).digest()
    return "eval" if int.from_bytes(digest, "little") % 8 == 0 else "train"


class EnvSettings(Component):
    """Settings of an environment: what makes its tasks and its episodes.

    A member also has `type`, by which it is chosen, and `max_turns`, the assistant turns an episode may take.
    """

    has_expert: ClassVar[bool] = False
    writes_tokens: ClassVar[bool] = False  # its prompts and answers come with `ids`

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a turn."""
        return ()

    @property
    def reward_range(self) -> tuple[float, float] | None:
        """The lowest and the highest sum of an episode's rewards; None where that is not known."""
        return None

    def make(self) -> Env:
        """Make an environment for one episode."""
        raise NotImplementedError

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List the tasks of a split; no task is in both.

        Raises:
            ConfigError: something that a setting names cannot be used on this machine.
            DataError: the tasks cannot be read.
        """
        raise NotImplementedError

    def expert(self, messages: Messages, task: Task) -> str:
        """Write what a perfect policy would write next; only where `has_expert`."""
        raise NotImplementedError(f"{type(self).__name__} has no expert")
