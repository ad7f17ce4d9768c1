"""Value heads: what a critic reads off its outputs, and the loss that goes with it. All in float32.

A head is `outputs = [hidden, 1] @ value_head`, with `value_head` `[D + 1, K]` and zero at the start, so that every
state has the same value then: 0, or the centre of the head's range.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ppojax.component import Component
from ppojax.lazy import Float, jax, jnp


class LinearHead(Component):
    """The output is the value, without bounds."""

    categorical: ClassVar[bool] = False
    outputs: ClassVar[int] = 1

    type: Literal["linear"] = Field(default="linear", description="any value")

    def value(self, output_K: Float[jax.Array, "*states 1"]) -> Float[jax.Array, "*states"]:
        """V = z."""
        return output_K[..., 0]


class _Bounded(Component):
    low: float = Field(default=0.0, description="lowest value; no return may be under it")
    high: float = Field(default=1.0, description="highest value; no return may be over it")

    @model_validator(mode="after")
    def _in_order(self) -> _Bounded:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be under high ({self.high})")
        return self


class ArctanHead(_Bounded):
    """A value inside a range that is known beforehand: an unbounded head predicts outside of it."""

    categorical: ClassVar[bool] = False
    outputs: ClassVar[int] = 1

    type: Literal["arctan"] = Field(default="arctan", description="a value between low and high")

    def value(self, output_K: Float[jax.Array, "*states 1"]) -> Float[jax.Array, "*states"]:
        """V = centre + half the range * (2 / pi) arctan z (BPCO, arXiv 2608.23566)."""
        centre, half = 0.5 * (self.high + self.low), 0.5 * (self.high - self.low)
        return centre + half * (2.0 / jnp.pi) * jnp.arctan(output_K[..., 0])

    def cross_entropy(
        self, output_K: Float[jax.Array, "*states 1"], target: Float[jax.Array, "*states"]
    ) -> Float[jax.Array, "*states"]:
        """- y log p - (1 - y) log(1 - p): binary cross-entropy of places in the range, y of the target, p of the value.

            p = 1/2 + arctan(z) / pi = atan2(1, -z) / pi,      y = (target - low) / (high - low), held in [0, 1]

        Its minimum over z is p = y. 1 - p is atan2(1, z) / pi: neither loses digits near 0. No gradient through y.
        """
        z = output_K[..., 0]
        y = jax.lax.stop_gradient(jnp.clip((target - self.low) / (self.high - self.low), 0.0, 1.0))
        below, above = (jnp.log(jnp.arctan2(jnp.ones_like(z), x) / jnp.pi) for x in (-z, z))
        return -y * below - (1.0 - y) * above


class HLGaussHead(_Bounded):
    """A distribution over bins of the range, fitted by cross-entropy to targets smoothed by a Gaussian.

    The value is the distribution's mean. A target nearer than about two sigma to an end of the range loses the part of
    its Gaussian beyond it and is learnt too far inside, so the range should be somewhat wider than the returns'.
    """

    categorical: ClassVar[bool] = True

    type: Literal["hl_gauss"] = Field(default="hl_gauss", description="a distribution over bins of [low, high]")
    low: float = Field(default=-0.1, description="lower end of the first bin, a little under the lowest return")
    high: float = Field(default=1.1, description="upper end of the last bin, a little over the highest return")
    bins: int = Field(default=101, ge=2, description="bins of equal width between low and high")
    sigma: float = Field(default=0.75, gt=0, description="deviation of a target's Gaussian, in widths of a bin")

    @property
    def outputs(self) -> int:
        """One logit a bin."""
        return self.bins

    @property
    def width(self) -> float:
        """Width of a bin."""
        return (self.high - self.low) / self.bins

    def value(self, output_K: Float[jax.Array, "*states K"]) -> Float[jax.Array, "*states"]:
        """V = sum_k softmax(z)_k centre_k."""
        # Centres as steps from the middle cancel exactly in the uniform distribution of the start.
        step_K = self.width * (jnp.arange(self.bins, dtype=jnp.float32) - 0.5 * (self.bins - 1))
        return 0.5 * (self.high + self.low) + jax.nn.softmax(output_K, axis=-1) @ step_K

    def target(self, target: Float[jax.Array, "*states"]) -> Float[jax.Array, "*states K"]:
        """Probability of each bin under a Gaussian about the target, cut off at the ends (arXiv 2403.03950, eq. 6).

            p_k = (Phi((right_k - y) / s) - Phi((left_k - y) / s)) / (Phi((high - y) / s) - Phi((low - y) / s))

        with s = sigma * width. Targets outside of the range count as its nearest end.
        """
        edge_E = self.low + self.width * jnp.arange(self.bins + 1, dtype=jnp.float32)
        y = jnp.clip(target, self.low, self.high)[..., None]
        edge_E = edge_E.reshape((1,) * target.ndim + (-1,))
        below_E = jax.scipy.special.erf((edge_E - y) / (2.0**0.5 * self.sigma * self.width))
        return jnp.diff(below_E, axis=-1) / (below_E[..., -1:] - below_E[..., :1])

    def cross_entropy(
        self, output_K: Float[jax.Array, "*states K"], target: Float[jax.Array, "*states"]
    ) -> Float[jax.Array, "*states"]:
        """- sum_k p_k log softmax(z)_k, with the target's p stop-gradiented."""
        p_K = jax.lax.stop_gradient(self.target(target))
        return -jnp.sum(p_K * jax.nn.log_softmax(output_K, axis=-1), axis=-1)


ValueHead = Annotated[LinearHead | ArctanHead | HLGaussHead, Field(discriminator="type")]
