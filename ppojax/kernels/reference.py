"""Token statistics with the logits held whole and the gradient left to autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ppojax.lazy import Float
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
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    target_N: jax.Array,
    reference: tuple[jax.Array, jax.Array] | None = None,
    id_NK: jax.Array | None = None,
    *,
    temperature: float,
    softcap: float | None = None,
    entropy: bool = False,
    kl: bool = False,
    reverse_kl: bool = False,
    tv: bool = False,
) -> TokenStats:
    """Compute `ppojax.kernels.token_stats` in the plainest way; memory is several times [N, V] float32."""
    logp_NV = jax.nn.log_softmax(logits(hidden_ND, head_VD, temperature, softcap), axis=-1)
    p_NV = jnp.exp(logp_NV)
    stats = TokenStats(jnp.take_along_axis(logp_NV, target_N[:, None], axis=-1)[:, 0])
    if entropy:
        stats = stats._replace(entropy=-jnp.sum(p_NV * logp_NV, axis=-1))
    if id_NK is not None:
        found_NK = jnp.take_along_axis(logp_NV, jnp.maximum(id_NK, 0), axis=-1)
        stats = stats._replace(topk_logp=jnp.where(id_NK >= 0, found_NK, 0.0))
    if reference is not None:
        other_ND, other_head_VD = jax.lax.stop_gradient(reference)
        log_q_NV = jax.nn.log_softmax(logits(other_ND, other_head_VD, temperature, softcap), axis=-1)
        q_NV = jnp.exp(log_q_NV)
        if kl:
            stats = stats._replace(kl=jnp.sum(p_NV * (logp_NV - log_q_NV), axis=-1))
        if reverse_kl:
            stats = stats._replace(reverse_kl=jnp.sum(q_NV * (log_q_NV - logp_NV), axis=-1))
        if tv:
            stats = stats._replace(tv=0.5 * jnp.sum(jnp.abs(p_NV - q_NV), axis=-1))
    return stats
