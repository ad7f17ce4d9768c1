"""Policy gradient inside a divergence trust region."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.losses.divergence import binary_kl, binary_tv, log_ratio
from ppojax.losses.policy import PolicyLoss
from ppojax.masking import masked_max, masked_mean
from ppojax.types import Batch, LossOut, Metrics, TokenStats

_DEFAULT_DELTA = {"tv": 0.2, "kl": 0.05}


class DPPO(PolicyLoss):
    """Divergence PPO: importance-weighted policy gradient without the tokens that would leave the trust region."""

    type: Literal["dppo"] = "dppo"
    divergence: Literal["tv", "kl"] = Field(
        default="tv", description="total variation, or KL from the anchor to the policy"
    )
    support: Literal["binary"] = Field(default="binary", description="binary: the drawn token against all others")
    anchor: Literal["behavior", "old"] = Field(
        default="behavior",
        description="policy the divergence is measured from; old is known to collapse, for comparison only",
    )
    delta_low: float | None = Field(
        default=None,
        gt=0,
        description="largest divergence for A < 0; null: 0.2 for tv, 0.05 for kl; 1 or more turns tv off",
    )
    delta_high: float | None = Field(default=None, gt=0, description="the same for A > 0")
    cap: float = Field(
        default=5.0,
        gt=0,
        allow_inf_nan=True,
        description="largest importance weight pi/mu; inf allowed; 3 is known to collapse",
    )

    @property
    def needs(self) -> frozenset[str]:
        """Which of the experience's optional log-probabilities the loss reads: `logp_old`, `logp_ref`."""
        return super().needs | ({"logp_old"} if self.anchor == "old" else set())

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute the loss of DPPO (arXiv 2602.04879, eq. 12) over the action tokens of a batch.

            loss_t = -A_t sg(min(rho_t, cap)) M_t log pi(y_t),          rho = pi/mu
            M_t = 0 where A_t > 0 and r_t > 1 and D_t > delta_high, or A_t < 0 and r_t < 1 and D_t > delta_low; else 1
            D_t = D(anchor(.|s_t) || pi(.|s_t)),                        r = pi/anchor

        With anchor = behavior, r = rho. The weight, the mask and A are stop-gradiented. log rho is held within +-20.
        `actor/pg_loss` reports the value above. Shares of masked tokens leave out tokens of zero advantage.
        """
        experience = batch.experience
        advantage_BT = jax.lax.stop_gradient(batch.advantage_BT)
        logp_BT = jax.lax.stop_gradient(stats.logp)
        anchor_BT = experience.logp_behavior_BT if self.anchor == "behavior" else experience.logp_old_BT
        assert anchor_BT is not None, "anchor=old, but logp_old was not scored"

        weight_BT = jnp.minimum(jnp.exp(log_ratio(logp_BT, experience.logp_behavior_BT)), self.cap)
        tv_BT = binary_tv(anchor_BT, logp_BT)
        kl_BT = binary_kl(anchor_BT, logp_BT)
        outside_BT = self._outside(tv_BT if self.divergence == "tv" else kl_BT, logp_BT - anchor_BT, advantage_BT)
        policy_BT = -advantage_BT * weight_BT * (~outside_BT).astype(jnp.float32) * stats.logp

        metrics = _trust_region_metrics(outside_BT, tv_BT, kl_BT, anchor_BT - logp_BT, batch)
        return self.assemble(policy_BT, stats, batch, metrics)

    def _outside(
        self,
        divergence_BT: Float[jax.Array, "B T"],
        log_ratio_BT: Float[jax.Array, "B T"],
        advantage_BT: Float[jax.Array, "B T"],
    ) -> Bool[jax.Array, "B T"]:
        default = _DEFAULT_DELTA[self.divergence]
        high = default if self.delta_high is None else self.delta_high
        low = default if self.delta_low is None else self.delta_low
        rises_BT = (advantage_BT > 0) & (log_ratio_BT > 0) & (divergence_BT > high)
        falls_BT = (advantage_BT < 0) & (log_ratio_BT < 0) & (divergence_BT > low)
        return rises_BT | falls_BT


def _trust_region_metrics(
    outside_BT: Bool[jax.Array, "B T"],
    tv_BT: Float[jax.Array, "B T"],
    kl_BT: Float[jax.Array, "B T"],
    fall_BT: Float[jax.Array, "B T"],
    batch: Batch,
) -> Metrics:
    action_BT, advantage_BT = batch.experience.action_BT, batch.advantage_BT
    moved_BT = action_BT & (advantage_BT != 0)
    # An update that lowers a token which the anchor gave at least half more (absolute) than the policy now does.
    bad_BT = (advantage_BT < 0) & (fall_BT > 0) & (tv_BT >= 0.5)
    outside_BT = outside_BT.astype(jnp.float32)
    return {
        "trust_region/masked_frac": masked_mean(outside_BT, moved_BT),
        "trust_region/masked_frac_pos": masked_mean(outside_BT, action_BT & (advantage_BT > 0)),
        "trust_region/masked_frac_neg": masked_mean(outside_BT, action_BT & (advantage_BT < 0)),
        "trust_region/bad_update_frac": masked_mean(bad_BT.astype(jnp.float32), moved_BT),
        "trust_region/tv_mean": masked_mean(tv_BT, action_BT),
        "trust_region/tv_max": masked_max(tv_BT, action_BT),
        "trust_region/kl_mean": masked_mean(kl_BT, action_BT),
        "actor/ppo_kl": masked_mean(fall_BT, action_BT),
    }
