"""The door between `flax.nnx` modules and the rest: a model outside is a hashable `ModelDef` and a dict of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.kernels import token_stats
from ppojax.mesh import sharding
from ppojax.models.critic import Critic
from ppojax.models.decoder import Decoder, KeyValue
from ppojax.models.spec import DecoderSpec
from ppojax.types import Experience, TokenStats

Params = dict[str, Any]


@dataclass(frozen=True)
class ModelDef:
    """All of a model but its numbers: a static argument of jit."""

    spec: DecoderSpec
    dtype: str = "float32"
    remat: bool = True
    critic: bool = False  # the decoder carries a value head


@lru_cache(maxsize=32)
def _structure(spec: DecoderSpec, critic: bool) -> tuple[nnx.GraphDef, nnx.State]:
    kind = Critic if critic else Decoder
    return nnx.split(nnx.eval_shape(lambda: kind(spec, nnx.Rngs(0))))


def _bind(model: ModelDef, params: Params) -> Any:
    """Put parameters, cast to the compute type, back into their module; a value head stays float32."""
    graphdef, abstract = _structure(model.spec, model.critic)
    cast = jax.tree.map(lambda p: p.astype(model.dtype), params)
    if model.critic:
        cast["value_head"] = params["value_head"]
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, cast)
    return nnx.merge(graphdef, state)


def init(model: ModelDef, key: jax.Array) -> Params:
    """Draw fresh parameters (float32)."""
    kind = Critic if model.critic else Decoder
    return nnx.to_pure_dict(nnx.state(kind(model.spec, nnx.Rngs(key))))


def abstract_params(model: ModelDef) -> Params:
    """Shapes and types of the master weights."""
    return nnx.to_pure_dict(_structure(model.spec, model.critic)[1])


def param_shardings(model: ModelDef, mesh: jax.sharding.Mesh) -> Params:
    """The sharding of each parameter on a mesh, from the logical axes that it declares."""
    state = _structure(model.spec, model.critic)[1]
    axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return jax.tree.map(
        lambda a: sharding(mesh, a), nnx.to_pure_dict(axes), is_leaf=lambda a: isinstance(a, tuple)
    )


def head_VD(params: Params) -> jax.Array:
    """The output head `[V, D]`: its own matrix, or the embedding where they are tied."""
    return params["head"] if "head" in params else params["embed"]


def hidden_states(
    model: ModelDef, params: Params, token_BT: jax.Array, position_BT: jax.Array, cache: KeyValue | None = None
) -> tuple[jax.Array, KeyValue]:
    """Final hidden states of `token_BT` and the tokens' keys and values (see `Decoder.__call__`)."""
    return _bind(model, params)(token_BT, position_BT, cache, remat=model.remat)


def positions(token_BT: jax.Array) -> jax.Array:
    """0, 1, 2, ... along each row."""
    return jnp.broadcast_to(jnp.arange(token_BT.shape[1], dtype=jnp.int32), token_BT.shape)


def score_tokens(
    model: ModelDef, params: Params, experience: Experience, *, temperature: float, entropy: bool = False
) -> TokenStats:
    """Score the actions of each row under the policy, aligned with their tokens; 0 elsewhere.

    `logp_BT[:, t] = log softmax(head @ hidden[:, t-1] / temperature)[token[:, t]]`. Only action positions meet the
    head, and the vocabulary is never held for all of them at once.
    """
    hidden_BTD, _ = hidden_states(model, params, experience.token_BT, positions(experience.token_BT))
    index_BA = experience.action_index_BA
    B, A = index_BA.shape
    # The one place of the shift: token t is scored by the hidden state of token t - 1. Filler indices are 0.
    before_BAD = jnp.take_along_axis(hidden_BTD, jnp.maximum(index_BA - 1, 0)[:, :, None], axis=1)
    target_BA = jnp.take_along_axis(experience.token_BT, index_BA, axis=1)
    head = head_VD(params).astype(model.dtype)
    stats = token_stats(
        before_BAD.reshape(B * A, -1), head, target_BA.reshape(B * A), temperature=temperature, entropy=entropy
    )

    def align(x_N: jax.Array | None) -> jax.Array | None:
        if x_N is None:
            return None
        x_BA = jnp.where(index_BA > 0, x_N.reshape(B, A), 0.0)
        return jnp.zeros(experience.token_BT.shape, jnp.float32).at[jnp.arange(B)[:, None], index_BA].add(x_BA)

    return TokenStats(align(stats.logp), align(stats.entropy))


def values(model: ModelDef, params: Params, token_BT: jax.Array) -> jax.Array:
    """Value of the state in which each token was chosen, `[M, B, T]` float32 (0 at t = 0: there is no state before).

    `value[:, :, t]` reads the hidden state of token t - 1, so it does not see token t.
    """
    after_MBT = _bind(model, params)(token_BT, positions(token_BT), remat=model.remat)
    return jnp.pad(after_MBT[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
