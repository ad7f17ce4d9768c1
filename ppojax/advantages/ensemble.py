"""What several critics' disagreement about a state decides: whether there is something to learn, or to explore."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import Bool, Float, jax, jnp


class Masks(NamedTuple):
    """Tokens by how far the critics are apart; None for what is not asked for. Means nothing off action."""

    agreed_BT: jax.Array | None = None  # bool: among the least apart
    explored_BT: jax.Array | None = None  # bool: not among the farthest apart


class EnsembleMask(Component):
    """Shares of the action tokens with the least and the largest deviation between critics."""

    agreed: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="this share of the action tokens, where critics differ least, gets no advantage (AsyPPO uses 0.2)",
    )
    disputed: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="this share, where critics differ most, gets no entropy bonus (AsyPPO uses 0.2)",
    )
    scope: Literal["row", "batch"] = Field(
        default="batch", description="what the shares are of: each row's action tokens, or all of the batch"
    )

    @property
    def on(self) -> bool:
        """Whether it decides anything, for which there must be several critics."""
        return self.agreed > 0 or self.disputed > 0

    def __call__(self, value_MBT: Float[jax.Array, "M B T"], action_BT: Bool[jax.Array, "B T"]) -> Masks:
        """Rank the n action tokens of a row or of the batch by sigma, the deviation between critics (arXiv 2510.01656).

            sigma_t = std_m V_m(s_t)
            agreed      sigma_t < the (floor(agreed n) + 1)-th smallest sigma
            disputed    sigma_t > the (floor(disputed n) + 1)-th largest sigma

        So never more than the share, exactly floor(share n) where all sigmas differ, and tokens of one sigma share one
        fate: where all critics are the same, sigma is 0 everywhere and nothing is masked. The paper gives 20% for both
        shares and says neither of what they are nor what ties do.
        """
        if not self.on:
            return Masks()
        # Of differences, so that equal critics give 0 and not the rounding of a mean.
        sigma_BT = jnp.std(value_MBT - value_MBT[:1], axis=0)
        return Masks(
            self._lowest(sigma_BT, action_BT, self.agreed) if self.agreed else None,
            ~self._lowest(-sigma_BT, action_BT, self.disputed) if self.disputed else None,
        )

    def _lowest(
        self, x_BT: Float[jax.Array, "B T"], action_BT: Bool[jax.Array, "B T"], share: float
    ) -> Bool[jax.Array, "B T"]:
        x_BT = jnp.where(action_BT, x_BT, jnp.inf)
        shape = x_BT.shape if self.scope == "row" else (1, x_BT.size)
        # 1e-6 more, so that 0.2 of 5 is 1 in float32 too.
        count_B1 = jnp.sum(action_BT.reshape(shape), axis=1, keepdims=True, dtype=jnp.float32)
        place_B1 = jnp.floor(share * (1.0 + 1e-6) * count_B1).astype(jnp.int32)
        limit_B1 = jnp.take_along_axis(jnp.sort(x_BT.reshape(shape), axis=1), place_B1, axis=1)
        return x_BT < limit_B1
