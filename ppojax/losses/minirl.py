"""MiniRL: importance weights to the sampler, a mask by the ratio to the policy at the start of the update."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import jax, jnp
from ppojax.losses.divergence import log_ratio
from ppojax.losses.weighted import WeightedLoss, region_metrics
from ppojax.types import Batch, LossOut, TokenStats


class MiniRL(WeightedLoss):
    """Importance-weighted policy gradient without the tokens that PPO would clip."""

    type: Literal["minirl"] = "minirl"
    clip_low: float = Field(default=0.2, gt=0, le=1, description="A < 0 counts from pi/pi_old = 1 - clip_low on")
    clip_high: float = Field(default=0.27, gt=0, description="A > 0 counts up to pi/pi_old = 1 + clip_high")

    @property
    def needs(self) -> frozenset[str]:
        """Which of the experience's optional arrays the loss reads: `logp_old`, `logp_ref`, `hidden_ref`."""
        return super().needs | {"logp_old"}

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute MiniRL's loss (arXiv 2512.01374; bounds and cap as in arXiv 2602.04879).

        loss_t = -A_t sg(min(rho_t, cap)) M_t log pi(y_t),      rho = pi/mu,  r = pi/pi_old
        M_t = 0 where A_t > 0 and r_t > 1 + clip_high, or A_t < 0 and r_t < 1 - clip_low; else 1
        """
        logp_old_BT = batch.experience.logp_old_BT
        assert logp_old_BT is not None, "MiniRL needs logp_old, which was not scored"
        ratio_BT = jnp.exp(log_ratio(jax.lax.stop_gradient(stats.logp), logp_old_BT))
        rises_BT = (batch.advantage_BT > 0) & (ratio_BT > 1.0 + self.clip_high)
        falls_BT = (batch.advantage_BT < 0) & (ratio_BT < 1.0 - self.clip_low)
        outside_BT = rises_BT | falls_BT
        weight_BT = jnp.where(outside_BT, 0.0, self.importance(stats, batch))
        return self.weigh(weight_BT, stats, batch, region_metrics(outside_BT, stats, batch))
