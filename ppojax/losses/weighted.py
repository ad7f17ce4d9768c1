"""What the losses share that weigh the policy gradient: loss_t = -A_t sg(w_t) log pi(y_t)."""

from __future__ import annotations

from pydantic import Field

from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.losses.divergence import Divergence, binary, log_ratio
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


def region_metrics(
    dropped_BT: Bool[jax.Array, "B T"],
    stats: TokenStats,
    batch: Batch,
    anchor_BT: Float[jax.Array, "B T"] | None = None,
    used: Divergence | None = None,
) -> Metrics:
    """Say how far the policy is from the anchor, and which tokens were left out, by the sign of their advantage.

    Shares of `dropped_BT` leave out tokens of zero advantage, and are of a minibatch; a training step logs their mean
    over its optimizer steps, in which 0 stands for a minibatch that has no such tokens. The anchor is the sampler
    unless another is given, and the divergence that of the drawn token unless another one is `used`.
    """
    e, advantage_BT = batch.experience, batch.advantage_BT
    logp_BT = jax.lax.stop_gradient(stats.logp)
    anchor_BT = e.logp_behavior_BT if anchor_BT is None else anchor_BT
    drawn, fall_BT = binary(anchor_BT, logp_BT), anchor_BT - logp_BT
    used = drawn if used is None else used
    moved_BT = e.action_BT & (advantage_BT != 0)
    # An update that lowers a token which the anchor gave at least half more (absolute) than the policy now does.
    bad_BT = (advantage_BT < 0) & (fall_BT > 0) & (drawn.tv >= 0.5)
    dropped_BT = dropped_BT.astype(jnp.float32)
    return {
        "trust_region/masked_frac": masked_mean(dropped_BT, moved_BT),
        "trust_region/masked_frac_pos": masked_mean(dropped_BT, e.action_BT & (advantage_BT > 0)),
        "trust_region/masked_frac_neg": masked_mean(dropped_BT, e.action_BT & (advantage_BT < 0)),
        "trust_region/bad_update_frac": masked_mean(bad_BT.astype(jnp.float32), moved_BT),
        "trust_region/tv_mean": masked_mean(used.tv, e.action_BT),
        "trust_region/tv_max": masked_max(used.tv, e.action_BT),
        "trust_region/kl_mean": masked_mean(used.kl, e.action_BT),
        "actor/ppo_kl": masked_mean(fall_BT, e.action_BT),
    }
