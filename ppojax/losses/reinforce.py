"""The plain policy gradient, with or without importance weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import jnp
from ppojax.losses.weighted import WeightedLoss, region_metrics
from ppojax.types import Batch, LossOut, TokenStats


class Reinforce(WeightedLoss):
    """REINFORCE: no trust region at all."""

    type: Literal["reinforce"] = "reinforce"
    importance_weight: bool = Field(
        default=True, description="weigh each token by min(pi/mu, cap); false: take the sampler for the policy"
    )

    @property
    def off_policy(self) -> bool:
        """Whether another policy may have drawn the tokens: with weights."""
        return self.importance_weight

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute the policy gradient loss (Williams 1992; with weights: token-level importance sampling).

        loss_t = -A_t sg(min(rho_t, cap)) log pi(y_t),      rho = pi/mu, or 1 without weights
        """
        plain_BT = jnp.ones_like(stats.logp)
        weight_BT = self.importance(stats, batch) if self.importance_weight else plain_BT
        return self.weigh(weight_BT, stats, batch, region_metrics(jnp.zeros_like(plain_BT, bool), stats, batch))
