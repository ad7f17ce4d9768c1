"""Between arrays over the tokens of a row and arrays over its actions alone."""

from __future__ import annotations

from ppojax.lazy import Int, jax, jnp


def at_actions(x_BT: jax.Array, index_BA: Int[jax.Array, "B A"]) -> jax.Array:
    """Take `[B, T]` at the action positions, `[B, A]`. Filler positions, which are 0, hold something of no meaning."""
    return jnp.take_along_axis(x_BT, index_BA, axis=1)


def to_tokens(x_BA: jax.Array, index_BA: Int[jax.Array, "B A"], tokens: int) -> jax.Array:
    """Put `[B, A]` at its positions of `[B, tokens]`, 0 elsewhere; what is at filler positions is dropped."""
    B, _ = index_BA.shape
    kept_BA = jnp.where(index_BA > 0, x_BA, 0.0)
    return jnp.zeros((B, tokens), x_BA.dtype).at[jnp.arange(B)[:, None], index_BA].add(kept_BA)
