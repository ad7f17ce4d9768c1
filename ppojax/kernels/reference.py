"""Token statistics with the logits held whole and the gradient left to autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ppojax.lazy import Float, Int
from ppojax.types import TokenStats


def product_dtype(hidden_ND: Float[jax.Array, "N D"], head_VD: Float[jax.Array, "V D"]) -> jnp.dtype:
    """The type that products are computed in: that of both, or float32 where they differ."""
    return hidden_ND.dtype if hidden_ND.dtype == head_VD.dtype else jnp.dtype("float32")


def cap_logits(z: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(z / softcap) (Gemma 2, arXiv 2408.00118), or z where it is None."""
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def logits(
    hidden_ND: Float[jax.Array, "N D"],
    head_VD: Float[jax.Array, "V D"],
    temperature: float,
    softcap: float | None = None,
) -> Float[jax.Array, "N V"]:
    """Multiply by the head, cap, and divide by the temperature, accumulating in float32."""
    dtype = product_dtype(hidden_ND, head_VD)
    product_NV = jnp.matmul(hidden_ND.astype(dtype), head_VD.astype(dtype).T, preferred_element_type=jnp.float32)
    product_NV = cap_logits(product_NV, softcap)
    return product_NV if temperature == 1.0 else product_NV / temperature


def token_stats(
    hidden_ND: Float[jax.Array, "N D"],
    head_VD: Float[jax.Array, "V D"],
    target_N: Int[jax.Array, " N"],
    *,
    temperature: float,
    entropy: bool,
    softcap: float | None = None,
) -> TokenStats:
    """Compute `ppojax.kernels.token_stats` in the plainest way; memory is several times [N, V] float32."""
    logp_NV = jax.nn.log_softmax(logits(hidden_ND, head_VD, temperature, softcap), axis=-1)
    logp_N = jnp.take_along_axis(logp_NV, target_N[:, None], axis=-1)[:, 0]
    if not entropy:
        return TokenStats(logp_N)
    return TokenStats(logp_N, -jnp.sum(jnp.exp(logp_NV) * logp_NV, axis=-1))
