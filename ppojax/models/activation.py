"""Gated activations of MLPs and experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ppojax.models.spec import Activation

CLIP = 7.0  # gpt-oss (arXiv 2508.10925): gate and up are clipped here
SLOPE = 1.702  # and its sigmoid is this steep


def gated(activation: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Combine the two products of a gated MLP (arXiv 2002.05202).

    - silu: gate sigmoid(gate) up. gelu_tanh: gelu(gate) up, gelu by its tanh approximation.
    - clipped_swiglu: g sigmoid(1.702 g) (u + 1) with g = min(gate, 7), u = clip(up, -7, 7).
    """
    if activation == "silu":
        return jax.nn.silu(gate) * up
    if activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    gate, up = jnp.minimum(gate, CLIP), jnp.clip(up, -CLIP, CLIP)
    return gate * jax.nn.sigmoid(SLOPE * gate) * (up + 1)
