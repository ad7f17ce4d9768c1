"""One episode while it is played: an append-only buffer of tokens, and what the environment said of them.

Token in, token out: what the policy wrote stays exactly as it was sampled; an observation is rendered as the suffix
that follows it and is never an action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from ppojax.envs import Env, Reset, Step, Task
from ppojax.rollout.prompts import check_messages
from ppojax.types import Ending, Messages, Recorded, Row

SEEDS = 2**20  # episodes of a call, at most, so that each segment of each has randomness of its own
MAX_REWARD = 1e18  # its square is finite in float32


class Turn(NamedTuple):
    """Where a turn of the policy begins."""

    token: int  # in the row
    message: int  # in its messages


@dataclass(frozen=True)
class Tail:
    """The end of a row, with which another one goes on behind its prompt."""

    token: list[int]
    messages: Messages
    turns: list[Turn]  # counted from its start


class LateEnv:
    """An environment that is made when its episode starts: that takes time, and fails, where a reset does."""

    def __init__(self, make: Callable[[], Env]) -> None:
        self._make, self._env = make, None

    def reset(self, task: Task) -> Reset:
        """Make the environment and start an episode."""
        self._env = self._make()
        return self._env.reset(task)

    def step(self, message: dict[str, Any]) -> Step:
        """Answer an assistant message."""
        assert self._env is not None, "reset comes before step"
        return self._env.step(message)

    def close(self) -> None:
        """Free what the episode held, if it came to that."""
        if self._env is not None:
            self._env.close()


@dataclass(eq=False)
class Episode:
    """One episode while it is played: the row that is being written, and those before it."""

    env: Env
    group: int
    number: int
    messages: Messages
    token: list[int]
    action: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    ending: Ending | None = None
    clipped: bool = False  # a turn ran into its limit
    info: dict[str, Any] = field(default_factory=dict)
    routed: np.ndarray | None = None  # of every token, when the sampler kept its choice of experts
    recorded: list[Recorded] = field(default_factory=lambda: [Recorded()])  # of the actions, piece by piece
    turns: list[Turn] = field(default_factory=list)  # of this row, the one that is being written among them
    segment: int = 0  # number of this row
    rows_before: list[Row] = field(default_factory=list)
    reset: Reset | None = None  # how it started
    hint: np.ndarray | None = None  # what only the critics are shown
    last: bool = False  # this row cannot be cut any more
    tail: Tail | None = None  # the policy is writing a summary: what stays beside it

    @property
    def seed(self) -> int:
        """What the randomness of this row depends on."""
        assert self.number < SEEDS
        return self.number + self.segment * SEEDS

    @property
    def written(self) -> int:
        """Tokens that the policy has written, in all rows."""
        return sum(self.action) + sum(int(row.action.sum()) for row in self.rows_before)

    def begin_turn(self) -> None:
        """What is written next is a turn of the policy."""
        self.turns.append(Turn(len(self.token), len(self.messages)))

    def write(self, ids: Sequence[int], *, action: bool, logp: Sequence[float] | None = None) -> None:
        """Append tokens to the row."""
        self.token += ids
        self.action += [action] * len(ids)
        self.logp += [0.0] * len(ids) if logp is None else logp
        self.reward += [0.0] * len(ids)

    def rewrite_turn(self, ids: Sequence[int], logp: Sequence[float], recorded: Recorded) -> None:
        """Replace the turn that has just been written, and what was kept of it."""
        start = self.turns[-1].token
        before, whole = sum(self.action[:start]), jax.tree.map(lambda *x: np.concatenate(x), *self.recorded)
        self.recorded = [jax.tree.map(lambda x: x[:before], whole), recorded]
        for column in (self.token, self.action, self.logp, self.reward):
            del column[start:]
        self.write(ids, action=True, logp=logp)

    def say(self, text: str) -> dict[str, Any]:
        """End the turn: what it says as a message, for the environment."""
        message = {"role": "assistant", "content": text, "tokens": len(self.token) - self.turns[-1].token}
        self.messages.append(message)
        return message

    def act(self, ids: list[int], logp: list[float], text: str) -> Messages:
        """Append a turn, let the environment answer, and return its new messages (empty when it is over)."""
        self.begin_turn()
        self.write(ids, action=True, logp=logp)
        message = self.say(text)
        try:
            step = self.env.step(message)
        except Exception as error:  # an environment is user code: its failure ends its own episode only
            return self.fail(error)
        return self.hear(step)

    def hear(self, step: Any) -> Messages:
        """Take an environment's answer; return its new messages (empty when the episode is over)."""
        try:
            return self._take(step)
        except Exception as error:  # as in `act`: it may have answered anything
            return self.fail(error)

    def _take(self, step: Step) -> Messages:
        numbers = [v for name, v in step.info.items() if name.startswith(("reward/", "failed/"))]
        if not all(abs(float(v)) <= MAX_REWARD for v in (step.reward, *numbers)):
            raise ValueError(f"reward {step.reward}, of parts {numbers}")
        check_messages(step.messages)
        self.reward[-1] += step.reward
        self.info.update(step.info)
        self.messages += step.messages
        if step.terminated or step.truncated:
            self.ending = Ending.TERMINATED if step.terminated else Ending.TRUNCATED
            return []
        return step.messages

    def fail(self, error: BaseException) -> Messages:
        """End the episode as an error, out of the loss and the group statistics."""
        self.ending = Ending.ERROR
        self.info |= {"error": type(error).__name__, "error_text": " ".join(str(error).split())[:200]}
        return []

    def drop(self, new: Messages) -> None:
        """End the episode before messages that there is no room for."""
        self.ending = Ending.TRUNCATED
        del self.messages[len(self.messages) - len(new) :]

    def cut(self, prompt: list[int], messages: Messages, tail: Tail) -> None:
        """End this row, and go on in another one: its prompt, then the tail."""
        self.rows_before.append(self._row(Ending.CUT))
        nothing = jax.tree.map(lambda kept: kept[:0], self.recorded[0])
        self.token, self.action, self.logp, self.reward, self.recorded = [], [], [], [], [nothing]
        self.routed, self.clipped, self.tail = None, False, None
        self.segment += 1
        self.turns = [Turn(turn.token + len(prompt), turn.message + len(messages)) for turn in tail.turns]
        self.messages = [*messages, *tail.messages]
        self.write([*prompt, *tail.token], action=False)

    def rows(self) -> list[Row]:
        """The finished rows; all of them are failed where the last one is."""
        assert self.ending is not None
        failed = self.ending == Ending.ERROR
        before = [replace(row, ending=Ending.ERROR) for row in self.rows_before] if failed else self.rows_before
        return [*before, self._row(self.ending)]

    def _row(self, ending: Ending) -> Row:
        return Row(
            token=np.array(self.token, np.int32),
            action=np.array(self.action, bool),
            logp_behavior=np.array(self.logp, np.float32),
            reward=np.array(self.reward, np.float32),
            group=self.group,
            episode=self.number,
            segment=self.segment,
            ending=ending,
            clipped=self.clipped,
            messages=self.messages,
            info=self.info,
            routed=self.routed,
            hint=self.hint,
            recorded=jax.tree.map(lambda *pieces: np.concatenate(pieces), *self.recorded),
        )

    def close(self) -> None:
        """Let the environment go; the episode is over, so that a failure here changes nothing."""
        with suppress(Exception):
            self.env.close()
