"""What the trainer asks of every loss on tokens."""

from __future__ import annotations

from pydantic import Field

from ppojax.component import Component
from ppojax.losses.aggregate import Aggregation
from ppojax.types import NO_RECORDS, Batch, Records


class TokenLoss(Component):
    """The base of the losses of the policy: it needs nothing, and takes what was drawn for the policy's own."""

    aggregation: Aggregation = Field(default=Aggregation(), description="how the losses of tokens are averaged")

    @property
    def needs(self) -> frozenset[str]:
        """Which of the experience's optional arrays the loss reads: `logp_old`, `logp_ref`, `hidden_ref`."""
        return frozenset()

    @property
    def off_policy(self) -> bool:
        """Whether another policy may have drawn the tokens: what the advantage multiplies has the ratio pi/mu in it."""
        return False

    @property
    def records(self) -> Records:
        """What the sampler must keep of its distribution for the loss."""
        return NO_RECORDS

    @property
    def entropy(self) -> bool:
        """Whether the loss reads the entropy of the policy."""
        return False

    def of_minibatch(self, batch: Batch) -> Batch:
        """Add what rows must know of their whole minibatch, before it is cut into microbatches."""
        return batch
