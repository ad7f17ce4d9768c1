"""What every policy loss shares: aggregation, the entropy bonus and the KL penalty."""

from __future__ import annotations

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import Float, jax, jnp
from ppojax.losses.aggregate import Aggregation
from ppojax.losses.entropy import EntropyControl
from ppojax.losses.kl import KLPenalty
from ppojax.masking import masked_mean
from ppojax.types import NO_RECORDS, Batch, LossOut, Metrics, Records, TokenStats


class PolicyLoss(Component):
    """The base of the policy losses. `needs`, `records` and `entropy` say what must be there before the loss can be."""

    aggregation: Aggregation = Field(default=Aggregation(), description="how the losses of tokens are averaged")
    entropy_coefficient: float = Field(
        default=0.0, description="weight of the entropy bonus (full vocabulary, with gradient)"
    )
    entropy_control: EntropyControl | None = Field(
        default=None, description="move the bonus so that the entropy stays at a target; null: keep it as it is"
    )
    kl: KLPenalty = Field(default=KLPenalty(), description="KL penalty to the reference policy")
    positive_nll: float = Field(
        default=0.0,
        ge=0,
        description="weight of -log pi on the tokens of episodes with a reward over positive_from (VAPO uses 0.1)",
    )
    positive_from: float = Field(default=0.0, description="reward of an episode over which it is to be imitated")

    @property
    def needs(self) -> frozenset[str]:
        """Which of the experience's optional arrays the loss reads: `logp_old`, `logp_ref`, `hidden_ref`."""
        return self.kl.needs

    @property
    def off_policy(self) -> bool:
        """Whether another policy may have drawn the tokens: what the advantage multiplies has the ratio pi/mu in it."""
        return True

    @property
    def records(self) -> Records:
        """What the sampler must keep of its distribution for the loss."""
        return NO_RECORDS

    @property
    def entropy(self) -> bool:
        """Whether the loss reads the entropy of the policy."""
        return self.entropy_coefficient != 0 or self.entropy_control is not None

    def assemble(
        self, policy_BT: Float[jax.Array, "B T"], stats: TokenStats, batch: Batch, metrics: Metrics
    ) -> LossOut:
        """Aggregate policy - c H + kl.coefficient KL - positive_nll P log pi, adding each part's metric.

        H is the entropy, and c `entropy_coefficient` times the batch's own weight of the token, if it has one; P is 1
        in episodes with a reward over `positive_from`, else 0 (VAPO, arXiv 2504.05118). All are averaged alike. The
        entropy is reported whenever it is there, the KL when it is penalised.
        """
        mask_BT = batch.experience.action_BT
        total_BT = policy_BT
        metrics = {**metrics, "actor/pg_loss": self.aggregation(policy_BT, mask_BT, batch.written_B)}
        if stats.entropy is not None:
            metrics["actor/entropy"] = masked_mean(stats.entropy, mask_BT)
        if self.entropy:
            assert stats.entropy is not None, "the loss has an entropy bonus, but no entropy was computed"
            weight_BT = 1.0 if batch.entropy_BT is None else jax.lax.stop_gradient(batch.entropy_BT)
            total_BT = total_BT - self.entropy_coefficient * weight_BT * stats.entropy
        if self.kl.needs:
            kl_BT = self.kl(stats, batch.experience)
            metrics["actor/kl_loss"] = self.aggregation(kl_BT, mask_BT, batch.written_B)
            total_BT = total_BT + self.kl.coefficient * kl_BT
        if self.positive_nll:
            assert batch.score_B is not None, "positive_nll needs the rewards of episodes, which the batch has not"
            nll_BT = jnp.where(batch.score_B[:, None] > self.positive_from, -stats.logp, 0.0)
            metrics["actor/positive_nll"] = self.aggregation(nll_BT, mask_BT, batch.written_B)
            total_BT = total_BT + self.positive_nll * nll_BT
        total = self.aggregation(total_BT, mask_BT, batch.written_B)
        return LossOut(total.sum, total.weight, jax.lax.stop_gradient(metrics))
