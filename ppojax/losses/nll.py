"""Supervised learning of the action tokens."""

from __future__ import annotations

from typing import Literal

from ppojax.lazy import jax
from ppojax.losses.base import TokenLoss
from ppojax.masking import masked_mean
from ppojax.types import Batch, LossOut, Metrics, TokenStats


class NLL(TokenLoss):
    """Negative log-likelihood of the action tokens, whatever their advantage: warm starts and imitation."""

    type: Literal["nll"] = "nll"

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute loss_t = -log pi(y_t) over the action tokens, in nats. `actor/nll_loss` is its mean over tokens."""
        action_BT = batch.experience.action_BT
        total = self.aggregation(-stats.logp, action_BT, batch.written_B)
        metrics: Metrics = {"actor/nll_loss": masked_mean(-stats.logp, action_BT)}
        return LossOut(total.sum, total.weight, jax.lax.stop_gradient(metrics))
