"""What every policy loss shares: aggregation, the entropy bonus and the KL penalty."""

from __future__ import annotations

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import Float, jax
from ppojax.losses.aggregate import Aggregation
from ppojax.losses.kl import KLPenalty
from ppojax.masking import masked_mean
from ppojax.types import NO_RECORDS, Batch, LossOut, Metrics, Records, TokenStats


class PolicyLoss(Component):
    """The base of the policy losses. `needs`, `records` and `entropy` say what must be there before the loss can be."""

    aggregation: Aggregation = Field(default=Aggregation(), description="how the losses of tokens are averaged")
    entropy_coefficient: float = Field(
        default=0.0, description="weight of the entropy bonus (full vocabulary, with gradient)"
    )
    kl: KLPenalty = Field(default=KLPenalty(), description="KL penalty to the reference policy")

    @property
    def needs(self) -> frozenset[str]:
        """Which of the experience's optional arrays the loss reads: `logp_old`, `logp_ref`, `hidden_ref`."""
        return self.kl.needs

    @property
    def records(self) -> Records:
        """What the sampler must keep of its distribution for the loss."""
        return NO_RECORDS

    @property
    def entropy(self) -> bool:
        """Whether the loss reads the entropy of the policy."""
        return self.entropy_coefficient != 0

    def assemble(
        self, policy_BT: Float[jax.Array, "B T"], stats: TokenStats, batch: Batch, metrics: Metrics
    ) -> LossOut:
        """Aggregate policy - entropy_coefficient * H + kl.coefficient * KL, adding each part's metric.

        The entropy is reported whenever it is there, the KL when it is penalised.
        """
        mask_BT = batch.experience.action_BT
        total_BT = policy_BT
        metrics = {**metrics, "actor/pg_loss": self.aggregation(policy_BT, mask_BT)}
        if stats.entropy is not None:
            metrics["actor/entropy"] = masked_mean(stats.entropy, mask_BT)
        if self.entropy:
            assert stats.entropy is not None, "the loss has an entropy bonus, but no entropy was computed"
            total_BT = total_BT - self.entropy_coefficient * stats.entropy
        if self.kl.needs:
            kl_BT = self.kl(stats, batch.experience)
            metrics["actor/kl_loss"] = self.aggregation(kl_BT, mask_BT)
            total_BT = total_BT + self.kl.coefficient * kl_BT
        total = self.aggregation(total_BT, mask_BT)
        return LossOut(total.sum, total.weight, jax.lax.stop_gradient(metrics))
