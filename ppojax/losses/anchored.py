"""What the losses share that compare the policy with the sampler, or with the policy at the start of the update."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.lazy import Float, jax
from ppojax.losses.policy import PolicyLoss
from ppojax.types import Batch


class AnchoredLoss(PolicyLoss):
    """A loss whose ratio, or divergence, is taken to one of two policies."""

    anchor: Literal["behavior", "old"] = Field(
        default="behavior",
        description="below the ratio: what the sampler recorded, or the policy at the start of the update",
    )

    @property
    def needs(self) -> frozenset[str]:
        """As every policy loss, with the policy at the start of the update."""
        return super().needs | ({"logp_old"} if self.anchor == "old" else set())

    @property
    def off_policy(self) -> bool:
        """With a ratio to the sampler."""
        return self.anchor == "behavior"

    def logp_anchor(self, batch: Batch) -> Float[jax.Array, "B T"]:
        """Log-probabilities of the anchor, stop-gradiented."""
        e = batch.experience
        logp_BT = e.logp_behavior_BT if self.anchor == "behavior" else e.logp_old_BT
        assert logp_BT is not None, "anchor=old, but logp_old was not scored"
        return jax.lax.stop_gradient(logp_BT)
