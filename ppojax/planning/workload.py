"""How much there is to do in a step: its shapes when every row is as long as is assumed."""

from __future__ import annotations

from typing import NamedTuple

from ppojax.config import Config
from ppojax.experience.pack import bucketed
from ppojax.types import Layout


class Workload(NamedTuple):
    """The shapes of one training step.

    Attributes:
        rows: of the batch, what fills it up among them.
        length: token positions T of a row.
        layout: what rows share.
        actions: action positions A of a row.
        prompt: tokens of a prompt.
        written: tokens that the policy writes in a row.
        tokens: of a row, padding left out.
        slots: rows that are written at a time.
        positions: of a slot's cache.
    """

    rows: int
    length: int
    layout: Layout
    actions: int
    prompt: int
    written: int
    tokens: int
    slots: int
    positions: int

    def read(self, rows: int) -> int:
        """Positions that a model reads of so many rows; a shared prompt once."""
        own = self.length - self.layout.prefix
        return rows * own + rows // self.layout.group * self.layout.prefix

    def pairs(self, rows: int) -> int:
        """(query, key) places of them, masked ones included."""
        own = self.length - self.layout.prefix
        return rows * own * self.length + rows // self.layout.group * self.layout.prefix**2


def workload_of(
    config: Config, *, prompt_tokens: int | None = None, row_tokens: int | None = None, segments: int = 1
) -> Workload:
    """The shapes of a step.

    Args:
        config: of the run.
        prompt_tokens: of each prompt; None: rollout.max_prompt_tokens, or a quarter of rollout.max_tokens.
        row_tokens: of each row; None: rollout.max_tokens, the most there can be.
        segments: rows of each episode, more than one where its history is compacted.
    """
    settings = config.rollout
    tokens = min(row_tokens or settings.max_tokens, settings.max_tokens) - 1
    prompt = min(prompt_tokens or settings.max_prompt_tokens or settings.max_tokens // 4, tokens - 1)
    group = settings.group_size if config.update.shared_prefix and segments == 1 else 1
    layout = Layout(group, bucketed(prompt, settings.prompt_bucket, settings.max_tokens)) if group > 1 else Layout()
    rest = tokens + 1 - (prompt if group > 1 else 0)
    length = layout.prefix + bucketed(rest, settings.row_bucket, settings.max_tokens)
    return Workload(
        rows=bucketed(settings.rows * segments, settings.rows, steps=2),
        length=length,
        layout=layout,
        actions=min(config.actions, length),
        prompt=prompt,
        written=min(config.actions, tokens - prompt),
        tokens=tokens,
        slots=settings.rows if settings.slots is None else settings.slots,
        positions=settings.max_tokens - 1,
    )


def passes_of(work: Workload) -> float:
    """Times that the loop of `decode` goes round in a step, with every slot in use."""
    return -(-work.rows // work.slots) * float(work.written)
