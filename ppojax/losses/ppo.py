"""The clipped surrogate of PPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import jax, jnp
from ppojax.losses.corrected import CorrectedLoss
from ppojax.losses.divergence import log_ratio
from ppojax.masking import masked_mean
from ppojax.types import Batch, LossOut, Metrics, TokenStats


class PPOClip(CorrectedLoss):
    """PPO with clipping of the probability ratio, asymmetric if wanted, and an optional dual clip."""

    type: Literal["ppo"] = "ppo"
    clip_low: float = Field(default=0.2, gt=0, le=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(
        default=0.2, gt=0, description="the ratio is clipped above at 1 + clip_high; DAPO uses 0.28"
    )
    dual_clip: float | None = Field(
        default=None, gt=1, description="largest ratio that counts for A < 0 (verl uses 3); null for no such bound"
    )

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute PPO's clipped loss (arXiv 1707.06347, eq. 7; dual clip: arXiv 1912.09729, eq. 5) of a batch.

            loss_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),    r = pi/pi_old
            with a dual clip c, where A < 0:  loss_t = min(loss_t, -A c)

        A and pi_old are stop-gradiented; log r is held within +-20. Metrics as verl's: `actor/pg_clipfrac` is the share
        of tokens where the clip decides, `actor/pg_clipfrac_lower` where the dual clip does. A correction multiplies
        the loss of each token.
        """
        logp_old_BT = self.logp_anchor(batch)
        advantage_BT = jax.lax.stop_gradient(batch.advantage_BT)
        action_BT = batch.experience.action_BT

        ratio_BT = jnp.exp(log_ratio(stats.logp, logp_old_BT))
        plain_BT = -advantage_BT * ratio_BT
        clipped_BT = -advantage_BT * jnp.clip(ratio_BT, 1.0 - self.clip_low, 1.0 + self.clip_high)
        policy_BT = jnp.maximum(plain_BT, clipped_BT)
        metrics: Metrics = {
            "actor/pg_clipfrac": masked_mean((clipped_BT > plain_BT).astype(jnp.float32), action_BT),
            "actor/ppo_kl": masked_mean(logp_old_BT - stats.logp, action_BT),
        }
        if self.dual_clip is not None:
            bound_BT = -advantage_BT * self.dual_clip
            bounded_BT = (advantage_BT < 0) & (policy_BT > bound_BT)
            policy_BT = jnp.where(bounded_BT, bound_BT, policy_BT)
            metrics["actor/pg_clipfrac_lower"] = masked_mean(bounded_BT.astype(jnp.float32), action_BT)
        return self.corrected(policy_BT, stats, batch, metrics)
