"""GSPO: the ratio of whole sequences, clipped."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import jax, jnp
from ppojax.losses.aggregate import Aggregation
from ppojax.losses.corrected import CorrectedLoss
from ppojax.losses.divergence import held
from ppojax.losses.sequence import over_row
from ppojax.masking import masked_mean
from ppojax.types import Batch, LossOut, Metrics, TokenStats

_BY_SEQUENCE = Aggregation(mode="seq_mean_token_mean")


class GSPO(CorrectedLoss):
    """PPO with one ratio a row: the geometric mean over its action tokens."""

    type: Literal["gspo"] = "gspo"
    aggregation: Aggregation = Field(default=_BY_SEQUENCE, description="how the losses of tokens are averaged")
    clip_low: float = Field(default=3e-4, gt=0, le=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(default=4e-4, gt=0, description="the ratio is clipped above at 1 + clip_high")

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute GSPO's loss, with a gradient at each token (arXiv 2507.18071, eq. 5, 7 and, GSPO-token, 13 to 14).

            s = exp(1/n sum_t log r_t),  r = pi/pi_old      loss = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))

        Every token has the row's ratio as its value, and as its gradient that of its own log pi: with
        `seq_mean_token_mean` and one advantage a row that is the gradient of the row's loss. A correction multiplies
        the loss of each token.

        The ratio is the row's also where compaction cut an episode into several: those may lie in other minibatches.
        `aggregation.sequence` only says how rows are averaged.
        """
        logp_old_BT = self.logp_anchor(batch)
        advantage_BT = jax.lax.stop_gradient(batch.advantage_BT)
        action_BT = batch.experience.action_BT
        mean_BT = over_row(jax.lax.stop_gradient(stats.logp) - logp_old_BT, action_BT, mean=True)
        own_BT = stats.logp - jax.lax.stop_gradient(stats.logp)  # 0, with the gradient of log pi
        ratio_BT = jnp.exp(held(mean_BT) + own_BT)
        plain_BT = -advantage_BT * ratio_BT
        clipped_BT = -advantage_BT * jnp.clip(ratio_BT, 1.0 - self.clip_low, 1.0 + self.clip_high)
        metrics: Metrics = {
            "actor/pg_clipfrac": masked_mean((clipped_BT > plain_BT).astype(jnp.float32), action_BT),
            "actor/ppo_kl": masked_mean(logp_old_BT - stats.logp, action_BT),
        }
        return self.corrected(jnp.maximum(plain_BT, clipped_BT), stats, batch, metrics)
