"""Supervised learning of the action tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import jax
from ppojax.losses.aggregate import Aggregation
from ppojax.masking import masked_mean
from ppojax.types import NO_RECORDS, Batch, LossOut, Metrics, Records, TokenStats


class NLL(Component):
    """Negative log-likelihood of the action tokens, whatever their advantage: warm starts and imitation."""

    type: Literal["nll"] = "nll"
    aggregation: Aggregation = Field(default=Aggregation(), description="how the losses of tokens are averaged")

    @property
    def needs(self) -> frozenset[str]:
        """Which of the experience's optional arrays the loss reads: none."""
        return frozenset()

    @property
    def off_policy(self) -> bool:
        """Whether another policy may have drawn the tokens: it is taken for the data itself."""
        return False

    @property
    def records(self) -> Records:
        """What the sampler must keep of its distribution: nothing."""
        return NO_RECORDS

    @property
    def entropy(self) -> bool:
        """Whether the loss reads the entropy of the policy: it does not."""
        return False

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute loss_t = -log pi(y_t) over the action tokens, in nats. `actor/nll_loss` is its mean over tokens."""
        action_BT = batch.experience.action_BT
        total = self.aggregation(-stats.logp, action_BT, batch.written_B)
        metrics: Metrics = {"actor/nll_loss": masked_mean(-stats.logp, action_BT)}
        return LossOut(total.sum, total.weight, jax.lax.stop_gradient(metrics))
