"""A model by itself, for notebooks and scripts: load it, compute logits, write it as a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.models.families.family import Family
from ppojax.models.forward import ModelDef, Params, graphdef, head_VD, hidden_states, logits, positions
from ppojax.models.hf_write import SHARD_BYTES, Origin, write_hf
from ppojax.models.source import find_source
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """A model with its weights.

    Attributes:
        definition: all of it but the numbers.
        params: the weights, a nested dict.
        tokenizer: None where the folder has none.
    """

    definition: ModelDef
    params: Params
    tokenizer: Tokenizer | None
    family: Family
    origin: Origin

    @property
    def spec(self) -> DecoderSpec:
        """The shape of the decoder."""
        return self.definition.spec

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The structure of the `flax.nnx` module."""
        return graphdef(self.definition)

    def logits(
        self,
        params: Params,
        token_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        position_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the token after each one, float32 `[B, T, V]`.

        Args:
            params: the weights; `model.params`, or changed ones.
            mask_BT: True (or not 0) where a token is real; None: everywhere. Padding may stand on either side; its own
                logits mean nothing.
            position_BT: int32 positions, which count up by one from real token to real token; None: from 0.
        """
        return _logits(self.definition, params, jnp.asarray(token_BT, jnp.int32), mask_BT, position_BT)


@partial(jax.jit, static_argnames="definition")
def _logits(
    definition: ModelDef,
    params: Params,
    token_BT: jax.Array,
    mask_BT: jax.Array | None,
    position_BT: jax.Array | None,
) -> jax.Array:
    """The decoder wants padding on the right: real tokens move to the left, and their states back."""
    valid_BT = order_BT = None
    if mask_BT is not None:
        order_BT = jnp.argsort(mask_BT == 0, axis=1, stable=True)
        valid_BT = jnp.take_along_axis(mask_BT != 0, order_BT, axis=1)
        token_BT = jnp.take_along_axis(token_BT, order_BT, axis=1)
        if position_BT is not None:
            position_BT = jnp.take_along_axis(position_BT, order_BT, axis=1)
    if position_BT is None:
        position_BT = positions(token_BT)
    hidden_BTD = hidden_states(definition, params, token_BT, position_BT, valid_BT=valid_BT).hidden_BTD
    if order_BT is not None:
        hidden_BTD = jnp.take_along_axis(hidden_BTD, jnp.argsort(order_BT, axis=1)[:, :, None], axis=1)
    return logits(definition, head_VD(params).astype(hidden_BTD.dtype), hidden_BTD)


def load_from(path: str | Path, dtype: str, mesh: jax.sharding.Mesh | None) -> Model:
    """See `ppojax.models.load`."""
    source = find_source(str(path))
    bare = source.folder is not None and not (source.folder / "tokenizer.json").is_file()
    tokenizer = None if bare else source.tokenizer()
    definition = ModelDef(source.spec, dtype, remat="none", mesh=mesh)
    params = source.place(dtype, mesh)
    return Model(definition, params, tokenizer, source.family, Origin(tokenizer, source.folder, source.config))


def export_to(model: Model, path: str | Path, params: Params | None, dtype: str | None, shard_bytes: int) -> None:
    """See `ppojax.models.export`."""
    weights = model.params if params is None else params
    write_hf(path, model.family, model.spec, weights, model.origin, dtype=dtype, shard_bytes=shard_bytes or SHARD_BYTES)
