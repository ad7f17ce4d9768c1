"""A trust region with a budget along the row."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import Float, jax, jnp
from ppojax.losses.divergence import binary_tv
from ppojax.losses.weighted import WeightedLoss, region_metrics
from ppojax.types import Batch, LossOut, TokenStats


class CPPO(WeightedLoss):
    """DPPO's binary total variation, weighted by position, with a budget for what the prefix has moved."""

    type: Literal["cppo"] = "cppo"
    delta: float = Field(default=0.15, gt=0, description="largest weighted divergence; the paper: 0.15, for MoE 0.2")
    budget: float = Field(
        default=0.02, gt=0, description="least divergence that the prefix may have a token; at most twice that"
    )
    least_weight: float = Field(default=0.8, gt=0, le=1, description="weight of the last token; the first one has 1")

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute the loss of CPPO (arXiv 2606.10968) over the n action tokens of each row.

            D_t = |mu - pi|,   w_t = least + (1 - least) (n - t)/(n - 1),   Z_t = w_t D_t        (t = 1 .. n)
            c_t = min(delta, delta + b sum_{i<t} w_i - sum_{i<t} Z_i),   b = P90(D) held in [budget, 2 budget]
            loss_t = -A_t sg(min(rho_t, cap)) M_t log pi(y_t),   M_t = 1 where A_t (rho_t - 1) <= 0 or Z_t <= c_t

        The paper's code takes P90 over a batch; here it is over the row (nearest rank), so that microbatches do not
        matter. That part of the formula was known from a port's description only.
        """
        e, action_BT = batch.experience, batch.experience.action_BT
        logp_BT = jax.lax.stop_gradient(stats.logp)
        tv_BT = jnp.where(action_BT, binary_tv(e.logp_behavior_BT, logp_BT), 0.0)
        weight_BT = self._position_weight(action_BT.astype(jnp.float32))
        cost_BT = weight_BT * tv_BT
        budget_B1 = jnp.clip(_percentile(tv_BT, action_BT, 0.9), self.budget, 2.0 * self.budget)
        before_BT = budget_B1 * (jnp.cumsum(weight_BT, axis=1) - weight_BT) - (jnp.cumsum(cost_BT, axis=1) - cost_BT)
        room_BT = jnp.minimum(self.delta, self.delta + before_BT)
        away_BT = batch.advantage_BT * (logp_BT - e.logp_behavior_BT) > 0
        outside_BT = away_BT & (cost_BT > room_BT)
        importance_BT = jnp.where(outside_BT, 0.0, self.importance(stats, batch))
        return self.weigh(importance_BT, stats, batch, region_metrics(outside_BT, stats, batch))

    def _position_weight(self, action_BT: Float[jax.Array, "B T"]) -> Float[jax.Array, "B T"]:
        """w_t, 0 off action; a lone token has 1."""
        count_B1 = jnp.sum(action_BT, axis=1, keepdims=True)
        after_BT = count_B1 - jnp.cumsum(action_BT, axis=1)
        share_BT = jnp.where(count_B1 > 1, after_BT / jnp.maximum(count_B1 - 1.0, 1.0), 1.0)
        return action_BT * (self.least_weight + (1.0 - self.least_weight) * share_BT)


def _percentile(x_BT: jax.Array, mask_BT: jax.Array, share: float) -> jax.Array:
    """The share's percentile of x over the mask of each row, by nearest rank: [B, 1]; 0 where the mask is empty."""
    ordered_BT = jnp.sort(jnp.where(mask_BT, x_BT, jnp.inf), axis=1)
    count_B1 = jnp.sum(mask_BT, axis=1, keepdims=True)
    rank_B1 = jnp.maximum(jnp.ceil(share * count_B1.astype(jnp.float32)).astype(jnp.int32) - 1, 0)
    return jnp.where(count_B1 > 0, jnp.take_along_axis(ordered_BT, rank_B1, axis=1), 0.0)
