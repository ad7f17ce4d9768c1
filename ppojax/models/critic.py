"""The critic: a decoder trunk and a float32 value head; and how one is cut from a policy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.models.decoder import Decoder
from ppojax.models.lora import LoRAConfig
from ppojax.models.spec import DecoderSpec
from ppojax.models.value_head import ValueHead


class Critic(nnx.Module):
    """A decoder and a value head that starts at zero."""

    def __init__(self, spec: DecoderSpec, head: ValueHead, rngs: nnx.Rngs, lora: LoRAConfig | None = None) -> None:
        self.trunk = Decoder(spec, rngs, lora)
        self.value_head = nnx.Param(new_head(spec, head), axes=(None, None))

    def outputs(self, hidden_BTD: jax.Array) -> jax.Array:
        """Outputs of the head for each state, [hidden, 1] @ head: `[B, T, K]` float32."""
        head = self.value_head[...]
        product = jnp.matmul(hidden_BTD.astype(jnp.float32), head[:-1], precision=jax.lax.Precision.HIGHEST)
        return product + head[-1].reshape(1, 1, -1)


def new_head(spec: DecoderSpec, head: ValueHead) -> jax.Array:
    """A head `[D + 1, K]` for which all states are alike."""
    return jnp.zeros((spec.width + 1, head.outputs), jnp.float32)


def cut_spec(spec: DecoderSpec, layers: int) -> DecoderSpec:
    """Describe the first `layers` blocks of a decoder, which has no use for a vocabulary head and so is tied.

    Raises:
        ValueError: the decoder has fewer blocks than asked for.
    """
    if layers > spec.layers:
        raise ValueError(f"critic.model.layers = {layers}, but the actor has {spec.layers} layers")
    only_dense = spec.moe is not None and layers <= spec.moe.dense_first
    changes = {
        "layers": layers,
        "tied": True,
        "windowed": spec.windowed[:layers],
        "unrotated": spec.unrotated[:layers],
        "moe": None if only_dense else spec.moe,
    }
    return spec.model_copy(update=changes)


def cut_trunk(spec: DecoderSpec, params: dict[str, Any], layers: int) -> dict[str, Any]:
    """Take the embeddings, the first `layers` blocks and the final norm of a decoder's parameters."""
    dense = 0 if spec.moe is None else spec.moe.dense_first

    def first(stack: str, count: int) -> dict[str, Any]:
        return jax.tree.map(lambda p: p[:count], params[stack])

    if 0 < layers <= dense:  # what is left is all dense
        stacks = {"layers": first("dense_layers", layers)}
    elif dense:
        stacks = {"dense_layers": params["dense_layers"], "layers": first("layers", layers - dense)}
    else:
        stacks = {"layers": first("layers", layers)}
    return {"embed": params["embed"], **stacks, "norm": params["norm"]}
