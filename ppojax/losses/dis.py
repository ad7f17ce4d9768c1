"""Double-sided importance sampling, the loss of SAO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import jax, jnp
from ppojax.losses.divergence import log_ratio
from ppojax.losses.policy import PolicyLoss
from ppojax.losses.weighted import region_metrics
from ppojax.types import Batch, LossOut, TokenStats


class DIS(PolicyLoss):
    """Importance-weighted policy gradient of the tokens whose ratio to the sampler is neither small nor large."""

    type: Literal["dis"] = "dis"
    clip_low: float = Field(
        default=0.3, gt=0, le=1, description="tokens count whose ratio is over 1 - clip_low; SAO: 0.3, for code 0.8"
    )
    clip_high: float = Field(
        default=5.0, gt=0, description="tokens count whose ratio is under 1 + clip_high; SAO: 5, for code 3"
    )

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute the loss of SAO (arXiv 2607.07508). The sign of the advantage does not matter to the mask.

            loss_t = -A_t sg(f(rho_t)) log pi(y_t),      f(x) = x where 1 - clip_low < x < 1 + clip_high, else 0

        with rho = pi/mu. Nothing is scored before the update.
        """
        log_BT = log_ratio(jax.lax.stop_gradient(stats.logp), batch.experience.logp_behavior_BT)
        ratio_BT = jnp.exp(log_BT)
        inside_BT = (ratio_BT > 1.0 - self.clip_low) & (ratio_BT < 1.0 + self.clip_high)
        advantage_BT = jax.lax.stop_gradient(batch.advantage_BT)
        policy_BT = -advantage_BT * jnp.where(inside_BT, ratio_BT, 0.0) * stats.logp
        return self.assemble(policy_BT, stats, batch, region_metrics(~inside_BT, stats, batch))
