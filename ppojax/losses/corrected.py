"""What the losses share that clip a ratio to the policy at the start of the update, or to the sampler."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ppojax.lazy import Float, jax
from ppojax.losses.anchored import AnchoredLoss
from ppojax.losses.correction import Correction
from ppojax.types import Batch, LossOut, Metrics, TokenStats


class CorrectedLoss(AnchoredLoss):
    """A loss of pi/pi_old, which may be corrected for a sampler that is not pi_old."""

    anchor: Literal["old", "behavior"] = Field(
        default="old",
        description="policy the ratio is taken to: old, the policy at the start of the update; behavior, the sampler "
        "(verl's bypass mode; with actor.perturb the ratio of ALP)",
    )

    correction: Correction = Field(
        default=Correction(), description="weight for the difference between the sampler and the policy it was"
    )

    @property
    def off_policy(self) -> bool:
        """With a ratio to the sampler, or a correction for it."""
        return super().off_policy or self.correction.method != "none"

    @model_validator(mode="after")
    def _corrects_something(self) -> CorrectedLoss:
        if self.anchor == "behavior" and self.correction.method != "none":
            raise ValueError(
                f"anchor=behavior: the ratio is over the sampler already; correction.method={self.correction.method} "
                "would count the difference twice: set correction.method=none, or anchor=old"
            )
        return self

    def corrected(
        self, policy_BT: Float[jax.Array, "B T"], stats: TokenStats, batch: Batch, metrics: Metrics
    ) -> LossOut:
        """Assemble the loss times its correction."""
        weight_BT, weights = self.correction(batch.experience)
        return self.assemble(weight_BT * policy_BT, stats, batch, metrics | weights)
