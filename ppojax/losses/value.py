"""The critics' regression loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import Float, jax, jnp
from ppojax.losses.aggregate import Aggregation
from ppojax.masking import masked_mean
from ppojax.types import Batch, LossOut, Metrics


class ValueLoss(Component):
    """Half the squared error of each critic's value, optionally clipped around the value at the start of the update."""

    type: Literal["mse"] = "mse"
    clip: float | None = Field(
        default=None,
        gt=0,
        description="farthest a value may move from the one the returns were made with; null for no clip",
    )
    cross_entropy: bool = Field(
        default=False,
        description="fit a bounded head (arctan) by binary cross-entropy in place of the squared error; hl_gauss is "
        "always fitted by its own",
    )
    scale: float = Field(
        default=1.0,
        gt=0,
        description="times the loss (NeMo-RL's PPO uses 0.4); Adam feels it through max_grad_norm only",
    )
    aggregation: Aggregation = Field(default=Aggregation(), description="how the losses of tokens are averaged")

    def __call__(
        self,
        value_MBT: Float[jax.Array, "M B T"],
        batch: Batch,
        cross_entropy_MBT: Float[jax.Array, "M B T"] | None = None,
    ) -> LossOut:
        """Compute the loss of M critics on the action tokens of a batch, summed over the critics.

            loss_t = 1/2 (V - R)^2
            loss_t = 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)   with clip c (arXiv 2005.12729, sec. 3)
            loss_t = the head's cross-entropy                                    where it is given

        times `scale`, which the metrics leave out. The weight counts tokens, not critics, so that each critic's
        gradient does not depend on how many there are. Returns and old values are stop-gradiented. Metrics are means
        over critics, as verl names them.
        """
        action_BT = batch.experience.action_BT
        metrics: Metrics = {}
        if cross_entropy_MBT is not None:
            loss_MBT = cross_entropy_MBT
        else:
            loss_MBT = self._half_square(value_MBT, batch, metrics)
        total = self.aggregation(self.scale * jnp.sum(loss_MBT, axis=0), action_BT, batch.written_B)
        metrics["critic/vf_loss"] = self.aggregation(jnp.mean(loss_MBT, axis=0), action_BT, batch.written_B)
        metrics["critic/vpred_mean"] = masked_mean(jnp.mean(value_MBT, axis=0), action_BT)
        return LossOut(total.sum, total.weight, jax.lax.stop_gradient(metrics))

    def _half_square(
        self, value_MBT: Float[jax.Array, "M B T"], batch: Batch, metrics: Metrics
    ) -> Float[jax.Array, "M B T"]:
        """Half the squared error; with a clip, its share goes into `metrics`."""
        assert batch.return_MBT is not None, "no critic targets: the advantage estimator returned none"
        target_MBT = jax.lax.stop_gradient(batch.return_MBT)
        error_MBT = jnp.square(value_MBT - target_MBT)
        if self.clip is not None:
            assert batch.experience.value_MBT is not None, "a clipped value loss needs the values before the update"
            old_MBT = jax.lax.stop_gradient(batch.experience.value_MBT)
            near_MBT = jnp.clip(value_MBT, old_MBT - self.clip, old_MBT + self.clip)
            clipped_MBT = jnp.square(near_MBT - target_MBT)
            share_BT = jnp.mean((clipped_MBT > error_MBT).astype(jnp.float32), axis=0)
            metrics["critic/vf_clipfrac"] = masked_mean(share_BT, batch.experience.action_BT)
            error_MBT = jnp.maximum(error_MBT, clipped_MBT)
        return 0.5 * error_MBT
