"""What the losses share that weigh the policy gradient: loss_t = -A_t sg(w_t) log pi(y_t)."""

from __future__ import annotations

from pydantic import Field

from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.losses.divergence import binary_kl, binary_tv, log_ratio
from ppojax.losses.policy import PolicyLoss
from ppojax.masking import masked_max, masked_mean
from ppojax.types import Batch, LossOut, Metrics, TokenStats


class WeightedLoss(PolicyLoss):
    """A policy gradient with a weight that is a constant to the gradient."""

    cap: float = Field(
        default=5.0, gt=0, allow_inf_nan=True, description="largest importance weight pi/mu; inf for no bound"
    )

    def importance(self, stats: TokenStats, batch: Batch) -> Float[jax.Array, "B T"]:
        """sg(min(pi/mu, cap)); log(pi/mu) is held within +-20."""
        log_BT = log_ratio(jax.lax.stop_gradient(stats.logp), batch.experience.logp_behavior_BT)
        return jnp.minimum(jnp.exp(log_BT), self.cap)

    def weigh(self, weight_BT: Float[jax.Array, "B T"], stats: TokenStats, batch: Batch, metrics: Metrics) -> LossOut:
        """Assemble -A sg(weight) log pi."""
        advantage_BT, weight_BT = jax.lax.stop_gradient((batch.advantage_BT, weight_BT))
        return self.assemble(-advantage_BT * weight_BT * stats.logp, stats, batch, metrics)


def region_metrics(dropped_BT: Bool[jax.Array, "B T"], stats: TokenStats, batch: Batch) -> Metrics:
    """Say how far the policy is from the sampler, and which tokens were left out, by the sign of their advantage."""
    e, advantage_BT = batch.experience, batch.advantage_BT
    logp_BT = jax.lax.stop_gradient(stats.logp)
    tv_BT, kl_BT = (measure(e.logp_behavior_BT, logp_BT) for measure in (binary_tv, binary_kl))
    dropped_BT = dropped_BT.astype(jnp.float32)
    return {
        "trust_region/masked_frac": masked_mean(dropped_BT, e.action_BT & (advantage_BT != 0)),
        "trust_region/masked_frac_pos": masked_mean(dropped_BT, e.action_BT & (advantage_BT > 0)),
        "trust_region/masked_frac_neg": masked_mean(dropped_BT, e.action_BT & (advantage_BT < 0)),
        "trust_region/tv_mean": masked_mean(tv_BT, e.action_BT),
        "trust_region/tv_max": masked_max(tv_BT, e.action_BT),
        "trust_region/kl_mean": masked_mean(kl_BT, e.action_BT),
        "actor/ppo_kl": masked_mean(e.logp_behavior_BT - logp_BT, e.action_BT),
    }
