"""The critic: a decoder trunk and a float32 value head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.models.decoder import Decoder
from ppojax.models.spec import DecoderSpec


class Critic(nnx.Module):
    """Values of the states after each token, from a decoder and a linear head that starts at zero."""

    def __init__(self, spec: DecoderSpec, rngs: nnx.Rngs) -> None:
        self.trunk = Decoder(spec, rngs)
        self.value_head = nnx.Param(jnp.zeros((spec.width + 1,), jnp.float32), axes=(None,))

    def __call__(self, token_BT: jax.Array, position_BT: jax.Array, *, remat: bool = False) -> jax.Array:
        """Return `[M=1, B, T]` float32: the value after token t, head @ [hidden, 1]."""
        hidden_BTD, _ = self.trunk(token_BT, position_BT, remat=remat)
        head = self.value_head[...].astype(jnp.float32)
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
