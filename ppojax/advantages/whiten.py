"""Advantages brought to mean 0 and deviation 1 over the tokens of a batch."""

from __future__ import annotations

from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.masking import masked_mean


def whiten(
    advantage_BT: Float[jax.Array, "B T"], mask_BT: Bool[jax.Array, "B T"], floor: float
) -> Float[jax.Array, "B T"]:
    """Compute (A - mean) / max(deviation, floor) over the tokens where the mask holds; what lies off it means nothing.

    Every token counts once, so a long row counts more. The deviation divides by n; verl and TRL divide by n - 1.
    """
    total = masked_mean(advantage_BT, mask_BT)
    centered_BT = advantage_BT - total.sum / jnp.maximum(total.weight, 1.0)
    square = masked_mean(jnp.square(centered_BT), mask_BT)
    deviation = jnp.sqrt(square.sum / jnp.maximum(square.weight, 1.0))
    return centered_BT / jnp.maximum(deviation, floor)
