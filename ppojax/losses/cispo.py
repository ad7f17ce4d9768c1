"""CISPO: clipped importance weights instead of clipped updates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import jax, jnp
from ppojax.losses.anchored import AnchoredLoss
from ppojax.losses.divergence import log_ratio
from ppojax.losses.weighted import region_metrics
from ppojax.masking import masked_mean
from ppojax.types import Batch, LossOut, TokenStats


class CISPO(AnchoredLoss):
    """Policy gradient in which every token counts, with an importance weight that is clipped."""

    type: Literal["cispo"] = "cispo"
    clip_low: float = Field(default=1.0, ge=0, le=1, description="the weight is at least 1 - clip_low; 1 for no bound")
    clip_high: float = Field(default=4.0, gt=0, description="the weight is at most 1 + clip_high")

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute CISPO's loss (MiniMax-M1, arXiv 2506.13585).

            loss_t = -A_t sg(clip(rho_t, 1 - clip_low, 1 + clip_high)) log pi(y_t),      rho = pi/anchor

        The default cap of 5 is that of ScaleRL, arXiv 2510.13786. `actor/pg_clipfrac` is the share of clipped weights.
        """
        ratio_BT = jnp.exp(log_ratio(jax.lax.stop_gradient(stats.logp), self.logp_anchor(batch)))
        weight_BT = jnp.clip(ratio_BT, 1.0 - self.clip_low, 1.0 + self.clip_high)
        advantage_BT = jax.lax.stop_gradient(batch.advantage_BT)
        clipped_BT = weight_BT != ratio_BT
        metrics = region_metrics(jnp.zeros_like(clipped_BT), stats, batch)
        metrics["actor/pg_clipfrac"] = masked_mean(clipped_BT.astype(jnp.float32), batch.experience.action_BT)
        return self.assemble(-advantage_BT * weight_BT * stats.logp, stats, batch, metrics)
