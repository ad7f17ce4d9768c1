"""What every policy loss shares: aggregation, the entropy bonus and the KL penalty."""

from __future__ import annotations

from pydantic import Field

from ppojax.lazy import Float, jax, jnp
from ppojax.losses.base import TokenLoss
from ppojax.losses.entropy import EntropyControl
from ppojax.losses.kl import KLPenalty
from ppojax.masking import masked_mean
from ppojax.types import Batch, LossOut, Metrics, TokenStats


class PolicyLoss(TokenLoss):
    """The base of the policy losses. `needs`, `records` and `entropy` say what must be there before the loss can be."""

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
        """As every loss says, with what a KL penalty reads."""
        return self.kl.needs

    @property
    def off_policy(self) -> bool:
        """With a ratio to the sampler, as most have it."""
        return True

    @property
    def entropy(self) -> bool:
        """With a bonus."""
        return self.entropy_coefficient != 0 or self.entropy_control is not None

    def of_minibatch(self, batch: Batch) -> Batch:
        """Say what the imitation of a row's tokens weighs, so that it is a mean over what is imitated.

        W / W' in rows to be imitated, else 0, with W the weight of the whole minibatch and W' that of these rows: the
        tokens of each, or what else `aggregation` counts (VAPO, arXiv 2504.05118, eq. 10).
        """
        if not self.positive_nll:
            return batch
        assert batch.score_B is not None, "positive_nll needs the rewards of episodes, which the batch has not"
        mask_BT, good_B = batch.experience.action_BT, batch.score_B > self.positive_from
        whole, good = (
            self.aggregation(batch.advantage_BT, mask, batch.written_B).weight
            for mask in (mask_BT, mask_BT & good_B[:, None])
        )
        scale = jnp.where(good > 0, whole / jnp.maximum(good, 1e-9), 0.0)
        return batch._replace(imitated_B=jnp.where(good_B, scale, 0.0))

    def assemble(
        self, policy_BT: Float[jax.Array, "B T"], stats: TokenStats, batch: Batch, metrics: Metrics
    ) -> LossOut:
        """Aggregate policy - c H + kl.coefficient KL - positive_nll P log pi, adding each part's metric.

        H is the entropy, and c `entropy_coefficient` times the batch's own weight of the token, if it has one; P is
        `imitated_B` (see `of_minibatch`), 0 but in episodes with a reward over `positive_from`. All are averaged alike.
        The entropy is reported whenever it is there, the KL when it is penalised.
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
            assert batch.imitated_B is not None, "positive_nll needs to know the whole minibatch: see of_minibatch"
            nll_BT = jax.lax.stop_gradient(batch.imitated_B)[:, None] * -stats.logp
            metrics["actor/positive_nll"] = self.aggregation(nll_BT, mask_BT, batch.written_B)
            total_BT = total_BT + self.positive_nll * nll_BT
        total = self.aggregation(total_BT, mask_BT, batch.written_B)
        return LossOut(total.sum, total.weight, jax.lax.stop_gradient(metrics))
