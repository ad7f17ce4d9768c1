"""MiniRL: importance weights to the sampler, a mask by the ratio to the policy at the start of the update."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import jax, jnp
from ppojax.losses.anchored import AnchoredLoss
from ppojax.losses.divergence import log_ratio
from ppojax.losses.weighted import WeightedLoss, region_metrics
from ppojax.types import Batch, LossOut, TokenStats


class MiniRL(AnchoredLoss, WeightedLoss):
    """Importance-weighted policy gradient without the tokens that PPO would clip."""

    type: Literal["minirl"] = "minirl"
    anchor: Literal["behavior", "old"] = Field(
        default="old", description="below the ratio of the mask: the policy at the start of the update, or the sampler"
    )
    clip_low: float = Field(default=0.2, gt=0, le=1, description="A < 0 counts from pi/anchor = 1 - clip_low on")
    clip_high: float = Field(default=0.27, gt=0, description="A > 0 counts up to pi/anchor = 1 + clip_high")
    relax_low: float = Field(
        default=0.0, ge=0, le=1, description="A < 0 counts, whatever the ratio, where the anchor gives less than this"
    )
    relax_high: float = Field(default=0.0, ge=0, le=1, description="the same for A > 0")

    @property
    def off_policy(self) -> bool:
        """Always: the weight is the ratio to the sampler, whatever the anchor."""
        return True

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute MiniRL's loss (arXiv 2512.01374; bounds and cap as in arXiv 2602.04879).

        loss_t = -A_t sg(min(rho_t, cap)) M_t log pi(y_t),      rho = pi/mu,  r = pi/anchor
        M_t = 0 where A_t > 0, r_t > 1 + clip_high and anchor_t >= relax_high,
              or where A_t < 0, r_t < 1 - clip_low and anchor_t >= relax_low; else 1

        With anchor=behavior and a `relax` over 0 on one side or both it is what DPPO's ablation relaxes, in which PPO's
        ratio holds back rare tokens (arXiv 2602.04879; the form as in a port, with bounds of 0.2 and 0.28).
        """
        anchor_BT = self.logp_anchor(batch)
        ratio_BT, given_BT = jnp.exp(log_ratio(jax.lax.stop_gradient(stats.logp), anchor_BT)), jnp.exp(anchor_BT)
        rises_BT = (batch.advantage_BT > 0) & (ratio_BT > 1.0 + self.clip_high) & (given_BT >= self.relax_high)
        falls_BT = (batch.advantage_BT < 0) & (ratio_BT < 1.0 - self.clip_low) & (given_BT >= self.relax_low)
        outside_BT = rises_BT | falls_BT
        weight_BT = jnp.where(outside_BT, 0.0, self.importance(stats, batch))
        return self.weigh(weight_BT, stats, batch, region_metrics(outside_BT, stats, batch))
