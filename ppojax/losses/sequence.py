"""Sums and means over the action tokens of a row, back at each of its tokens."""

from __future__ import annotations

from ppojax.lazy import Bool, Float, jax, jnp


def over_row(
    x_BT: Float[jax.Array, "B T"], action_BT: Bool[jax.Array, "B T"], *, mean: bool
) -> Float[jax.Array, "B T"]:
    """Sum (or average) x over the action tokens of each row, and give it to all of its tokens."""
    total_B1 = jnp.sum(jnp.where(action_BT, x_BT, 0.0), axis=1, keepdims=True)
    if mean:
        total_B1 = total_B1 / jnp.maximum(jnp.sum(action_BT, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
    return jnp.broadcast_to(total_B1, x_BT.shape)
