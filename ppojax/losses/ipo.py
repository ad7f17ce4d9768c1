"""A trust region that does not look at the sign of the advantage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import jax, jnp
from ppojax.losses.divergence import binary_tv, log_ratio
from ppojax.losses.weighted import WeightedLoss, region_metrics
from ppojax.masking import masked_mean
from ppojax.types import Batch, LossOut, TokenStats


class IPO(WeightedLoss):
    """prime-rl's loss: tokens outside the region count in neither direction, and all are drawn back to the sampler."""

    type: Literal["ipo"] = "ipo"
    cap: float = Field(
        default=float("inf"), gt=0, allow_inf_nan=True, description="largest importance weight pi/mu; inf for no bound"
    )
    delta: float = Field(default=0.1, gt=0, description="largest total variation |mu - pi| of the drawn token")
    pull: float = Field(default=1e-3, ge=0, description="weight of (log pi/mu)^2, which every token has")

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute the loss (prime-rl, August 2026; the last term is of Kimi K2.5).

        loss_t = -A_t sg(min(rho_t, cap)) M_t log pi(y_t) + pull (log rho_t)^2,      rho = pi/mu
        M_t = 1 where |mu(y_t) - pi(y_t)| <= delta, else 0
        """
        e = batch.experience
        outside_BT = binary_tv(e.logp_behavior_BT, jax.lax.stop_gradient(stats.logp)) > self.delta
        weight_BT = jnp.where(outside_BT, 0.0, self.importance(stats, batch))
        advantage_BT = jax.lax.stop_gradient(batch.advantage_BT)
        square_BT = jnp.square(log_ratio(stats.logp, e.logp_behavior_BT))
        metrics = region_metrics(outside_BT, stats, batch) | {"actor/pull": masked_mean(square_BT, e.action_BT)}
        policy_BT = -advantage_BT * weight_BT * stats.logp + self.pull * square_BT
        return self.assemble(policy_BT, stats, batch, metrics)
