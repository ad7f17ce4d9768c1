"""What the losses share whose ratio is taken to the policy at the start of the update."""

from __future__ import annotations

from pydantic import Field

from ppojax.lazy import Float, jax
from ppojax.losses.correction import Correction
from ppojax.losses.policy import PolicyLoss
from ppojax.types import Batch, LossOut, Metrics, TokenStats


class CorrectedLoss(PolicyLoss):
    """A loss of pi/pi_old, which may be corrected for a sampler that is not pi_old."""

    correction: Correction = Field(
        default=Correction(), description="weight for the difference between the sampler and the policy it was"
    )

    @property
    def needs(self) -> frozenset[str]:
        """Which of the experience's optional arrays the loss reads: `logp_old`, `logp_ref`, `hidden_ref`."""
        return super().needs | {"logp_old"}

    def logp_old(self, batch: Batch) -> Float[jax.Array, "B T"]:
        """Log-probabilities at the start of the update, stop-gradiented."""
        logp_old_BT = batch.experience.logp_old_BT
        assert logp_old_BT is not None, f"{type(self).__name__} needs logp_old, which was not scored"
        return jax.lax.stop_gradient(logp_old_BT)

    def corrected(
        self, policy_BT: Float[jax.Array, "B T"], stats: TokenStats, batch: Batch, metrics: Metrics
    ) -> LossOut:
        """Assemble the loss times its correction."""
        weight_BT, weights = self.correction(batch.experience)
        return self.assemble(weight_BT * policy_BT, stats, batch, metrics | weights)
