"""A trust region with a smooth edge."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import jax, jnp
from ppojax.losses.weighted import WeightedLoss, region_metrics
from ppojax.types import Batch, LossOut, TokenStats


class DRPO(WeightedLoss):
    """DPPO's region as a weight that falls to 0 at its edge and turns around behind it."""

    type: Literal["drpo"] = "drpo"
    delta: float = Field(default=0.2, gt=0, description="total variation of the drawn token at which its weight is 0")

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute the loss of DRPO (arXiv 2606.09821): the gradient of rho A - |A| mu (rho - 1)^2 / (2 delta).

            loss_t = -A_t sg(min(rho_t, cap) (1 - sign(A_t (rho_t - 1)) |pi - mu| / delta)) log pi(y_t),     rho = pi/mu

        Updates back toward the sampler weigh more than 1. `trust_region/masked_frac` is of tokens that turned around.
        """
        e = batch.experience
        logp_BT = jax.lax.stop_gradient(stats.logp)
        rise_BT = jnp.exp(logp_BT) - jnp.exp(e.logp_behavior_BT)
        slack_BT = 1.0 - jnp.sign(batch.advantage_BT) * rise_BT / self.delta
        weight_BT = self.importance(stats, batch) * slack_BT
        return self.weigh(weight_BT, stats, batch, region_metrics(slack_BT < 0, stats, batch))
