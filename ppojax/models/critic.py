"""The critic: a decoder trunk and a float32 value head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.models.decoder import Decoder
from ppojax.models.spec import DecoderSpec


class Critic(nnx.Module):
    """A decoder and a linear head that starts at zero."""

    def __init__(self, spec: DecoderSpec, rngs: nnx.Rngs) -> None:
        self.trunk = Decoder(spec, rngs)
        self.value_head = nnx.Param(jnp.zeros((spec.width + 1,), jnp.float32), axes=(None,))

    def value(self, hidden_BTD: jax.Array) -> jax.Array:
        """Value of each state, head @ [hidden, 1]: `[M=1, B, T]` float32."""
        head = self.value_head[...]
        return (hidden_BTD.astype(jnp.float32) @ head[:-1] + head[-1])[None]


def cut_from_actor(spec: DecoderSpec, params: dict[str, Any], layers: int) -> tuple[DecoderSpec, dict[str, Any]]:
    """Make a critic of the actor's embeddings, its first `layers` blocks and its final norm, with a zero head.

    The critic has no use for a vocabulary head, so it is tied whatever the actor is.

    Raises:
        ValueError: the actor has fewer blocks than asked for.
    """
    if layers > spec.layers:
        raise ValueError(f"critic.model.layers = {layers}, but the actor has {spec.layers} layers")
    trunk = {
        "embed": params["embed"],
        "layers": jax.tree.map(lambda p: p[:layers], params["layers"]),
        "norm": params["norm"],
    }
    head = jnp.zeros((spec.width + 1,), jnp.float32)
    return spec.model_copy(update={"layers": layers, "tied": True}), {"trunk": trunk, "value_head": head}
