"""Masked sums as (sum, weight) pairs, and how the parts of a batch are put together."""

from __future__ import annotations

from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.types import Max, Mean, Metrics


def masked_mean(x: Float[jax.Array, ...], mask: Bool[jax.Array, ...]) -> Mean:
    """Sum x where mask holds, with the count to divide by. Values off the mask may be anything, NaN too."""
    return Mean(jnp.sum(jnp.where(mask, x, 0.0)), jnp.sum(mask, dtype=jnp.float32))


def masked_max(x: Float[jax.Array, ...], mask: Bool[jax.Array, ...]) -> Max:
    """Take the largest x where mask holds; minus infinity where it holds nowhere, until `finish` makes it 0."""
    return Max(jnp.max(jnp.where(mask, x, -jnp.inf), initial=-jnp.inf))


def reduce_parts(stacked: Metrics) -> Metrics:
    """Put together metrics that carry one leading axis over the parts of a batch."""
    return {
        name: Max(jnp.max(m.value, axis=0)) if isinstance(m, Max) else Mean(m.sum.sum(0), m.weight.sum(0))
        for name, m in stacked.items()
    }


def finish(metrics: Metrics) -> dict[str, jax.Array]:
    """Divide each mean by its weight (0 when nothing was counted) and unwrap each maximum (likewise).

    NaN and infinity pass through: the log says them rather than a harmless 0.
    """

    def value(m: Mean | Max) -> jax.Array:
        if isinstance(m, Max):
            return jnp.where(jnp.isneginf(m.value), 0.0, m.value)
        return jnp.where(m.weight > 0, m.sum / jnp.maximum(m.weight, 1e-9), 0.0)

    return {name: value(m) for name, m in metrics.items()}
