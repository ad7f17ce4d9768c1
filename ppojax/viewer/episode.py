"""One episode, token by token: the rows of its chain (compaction makes several) one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import fmean, pstdev
from typing import NamedTuple

from ppojax.viewer.records import Record


class Token(NamedTuple):
    """What is known of one token; None for what the run did not record."""

    id: int
    text: str  # empty where the token is part of a character, or a special one
    action: bool  # chosen by the policy
    trained: bool  # an action of an episode that did not fail
    segment: int  # which row of the chain, from 0
    turn: int  # the policy's turns count from 1; what follows one belongs to it; 0 before the first
    reward: float
    logp: float | None = None  # of the sampler; None off action, as is all that follows
    advantage: float | None = None
    ratio: float | None = None  # of the trainer's probability to the sampler's, in the update
    held: bool = False  # had no gradient in the update: left out by the trust region, where the advantage is not 0
    value: float | None = None  # mean over the critics; from the first action of its row on
    spread: float | None = None  # standard deviation over the critics, where there are several


class Block(NamedTuple):
    """Tokens `start` to `end` (exclusive): one turn of the policy, or what it was told."""

    start: int
    end: int
    action: bool
    turn: int
    segment: int
    reward: float
    first: bool  # of its row: the prompt, or what compaction left of the history


@dataclass(frozen=True)
class Episode:
    """One episode of one step."""

    step: int
    group: int
    number: int
    ending: str
    error: str | None
    tokens: tuple[Token, ...]
    ends: tuple[float | None, ...]  # for each row: the critics' mean value of what follows, where it goes on
    critics: int

    @property
    def segments(self) -> int:
        """How many rows it has."""
        return len(self.ends)

    @property
    def reward(self) -> float:
        """The sum of its rewards."""
        return fsum(token.reward for token in self.tokens)

    @property
    def turns(self) -> int:
        """How often the policy spoke."""
        return self.tokens[-1].turn if self.tokens else 0

    def blocks(self) -> list[Block]:
        """Split the tokens where the speaker or the row changes."""
        tokens, out, start = self.tokens, [], 0
        for i in range(1, len(tokens) + 1):
            here, after = tokens[i - 1], tokens[i] if i < len(tokens) else None
            if after is None or (here.action, here.segment) != (after.action, after.segment):
                reward = fsum(token.reward for token in tokens[start:i])
                first = not out or out[-1].segment != here.segment
                out.append(Block(start, i, here.action, here.turn, here.segment, reward, first))
                start = i
        return out


def make_episode(step: int, chain: Sequence[Record]) -> Episode:
    """Join the rows of one episode, in the order of their segments."""
    tokens: list[Token] = []
    for segment, record in enumerate(chain):
        tokens += _tokens(record, segment, tokens[-1].turn if tokens else 0)
    last = chain[-1]
    critics = max(len(record.value or []) for record in chain)
    ends = tuple(_mean(record.value_end or []) for record in chain)
    return Episode(step, last.group, last.episode, last.ending, last.error, tuple(tokens), ends, critics)


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [x for x in numbers if x is not None]
    return fmean(known) if known else None


def _tokens(record: Record, segment: int, turn: int) -> Iterator[Token]:
    n = len(record.token)
    values = list(zip(*record.value, strict=True)) if record.value else [()] * n
    nothing = [None] * n
    advantages, ratios = record.advantage or nothing, record.ratio or nothing
    masks = record.mask or [1] * n
    before, acted = False, False
    for i, action in enumerate(map(bool, record.action)):
        turn += action and not before
        before, acted = action, acted or action
        # Before a row's first action values may not have been computed: no estimator reads them.
        known = values[i] if acted else ()
        yield Token(
            id=record.token[i],
            text=record.text[i],
            action=action,
            trained=action and record.ending != "error",
            segment=segment,
            turn=turn,
            reward=record.reward[i] or 0.0,
            logp=record.logp_behavior[i] if action else None,
            advantage=advantages[i] if action else None,
            ratio=ratios[i] if action else None,
            held=action and not masks[i],
            value=_mean(known),
            spread=pstdev(x for x in known if x is not None) if len(known) > 1 and None not in known else None,
        )


def turns_of(record: Record) -> int:
    """Count how often the policy spoke in a row."""
    before = [0, *record.action]
    return sum(here > last for here, last in zip(record.action, before, strict=False))
