"""Compaction: when a context is nearly full its history is replaced, and the episode goes on in a new row.

    row 0   [prompt | turn, observation, turn, observation, request | summary]
    row 1   [prompt with the summary | last turns as they were sampled | turn, observation, ...]

The policy writes the summary, so that its tokens are actions and are trained. What row 1 repeats of row 0 is copied
token by token, never written anew from its text, and is no action there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ppojax.envs import Reset
from ppojax.errors import ConfigError
from ppojax.models.tokenizer import Tokenizer
from ppojax.rollout.episode import Episode, Tail, Turn
from ppojax.rollout.settings import Summarize, Truncate
from ppojax.types import Messages

THOUGHT_ENDS = "</think>"


class Asked(NamedTuple):
    """What is written in a row before a summary."""

    token: list[int]
    messages: Messages  # that the tokens say


@dataclass(frozen=True)
class Compactor:
    """Decides when a context is replaced, and by what."""

    settings: Truncate | Summarize
    tokenizer: Tokenizer
    positions: int  # of a row, at most
    turn_tokens: int

    @cached_property
    def request(self) -> Messages:
        """What asks for a summary; nothing where none is written."""
        if isinstance(self.settings, Truncate):
            return []
        return [{"role": "user", "content": self.settings.request}]

    @cached_property
    def reserve(self) -> int:
        """Positions that turns leave free for the summary and its request."""
        if not self.request:
            return 0
        return len(self.tokenizer.suffix(self.request, ended=False)) + self.settings.written

    @cached_property
    def limit(self) -> int:
        """Tokens from which on a context is replaced."""
        largest = self.positions - self.reserve - 1
        if self.settings.limit is None:
            return max(largest - self.turn_tokens, 1)
        return self.settings.limit

    def check(self) -> None:
        """Check what needs the tokenizer.

        Raises:
            ConfigError: no context of `limit` tokens has room for a turn and a summary.
            DataError: the request cannot be written in this vocabulary.
        """
        self.tokenizer.render([{"role": "user", "content": self._headed("")}])
        room = self.positions - self.reserve - 1
        if room <= self.turn_tokens:
            raise ConfigError(
                f"rollout.compaction: of the {self.positions} positions of a row a summary and its request take "
                f"{self.reserve}, which leaves no room for a turn of {self.turn_tokens} tokens: raise "
                f"rollout.max_tokens, or lower rollout.max_turn_tokens or rollout.compaction.max_tokens"
            )
        if self.limit > room:
            raise ConfigError(
                f"rollout.compaction.limit={self.limit}: a row has {self.positions} positions, of which a summary and "
                f"its request take {self.reserve}: set rollout.compaction.limit to {room} or less"
            )

    def allowed(self, episode: Episode) -> bool:
        """Whether the row may be cut: not too often, and not where its start leaves no room for a turn and a summary.

        Such a row ends as the last one of an episode does, with turns of their full length.
        """
        started = episode.action.index(True) if True in episode.action else len(episode.token)
        roomy = started + self.turn_tokens + self.reserve <= self.positions
        return episode.segment < self.settings.most and roomy and not episode.last

    def turn_limit(self, episode: Episode) -> int:
        """Tokens that the episode's next turn may take."""
        free = self.positions - len(episode.token) - (self.reserve if self.allowed(episode) else 0)
        return max(min(self.turn_tokens, free), 1)

    def due(self, episode: Episode, tokens: int) -> bool:
        """Whether a context of `tokens` tokens is to be replaced."""
        return tokens > self.limit and self.allowed(episode)

    def tail(self, episode: Episode, suffix: list[int]) -> Tail | None:
        """What stays of an episode that was just answered: its last turns, and the answer to the last one, `suffix`.

        None where nothing could be left out: a context of one turn that is followed by no summary.
        """
        keep = min(self.settings.keep_turns, len(episode.turns) - 1)
        if keep == 0 and not self.request:
            return None
        turns = episode.turns[len(episode.turns) - keep :]
        if not turns:
            return Tail([], [], [])
        first = turns[0]
        # The answer is among the messages, and not yet in the row.
        moved = [Turn(turn.token - first.token, turn.message - first.message) for turn in turns]
        return Tail([*episode.token[first.token :], *suffix], episode.messages[first.message :], moved)

    def ask(self, episode: Episode, new: Messages, tail: Tail) -> Asked | None:
        """What asks for a summary, behind the answer `new`; nothing where none is written.

        An answer that has no room in this row is read in the next one, if it stays there; None where it would be lost.
        """
        if not self.request:
            return Asked([], [])
        ended = episode.token[-1] in self.tokenizer.eos_ids
        room = self.positions - len(episode.token) - self.settings.written
        for before in [new, []] if tail.turns else [new]:
            ids = self.tokenizer.suffix([*before, *self.request], ended=ended)
            if len(ids) <= room:
                return Asked(ids, [*before, *self.request])
        return None

    def prompt(self, reset: Reset, summary: str) -> Messages:
        """How the next row begins: the episode's own prompt, with the summary at the end of its last message."""
        messages = list(reset.messages)
        if not self.request:
            return messages
        text = self._headed(summary.rpartition(THOUGHT_ENDS)[2].strip())
        last = messages[-1]
        # Templates differ in whether a user may speak twice in a row.
        if last.get("role") == "user" and isinstance(last.get("content"), str):
            return [*messages[:-1], {**last, "content": f"{last['content']}{text}"}]
        return [*messages, {"role": "user", "content": text.lstrip()}]

    def _headed(self, summary: str) -> str:
        return f"{self.settings.header}{summary}" if isinstance(self.settings, Summarize) else ""
