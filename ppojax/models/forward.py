"""The door between `flax.nnx` modules and the rest: a model outside is a hashable `ModelDef` and a dict of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.actions import at_actions, to_tokens
from ppojax.kernels import cap_logits, token_stats
from ppojax.mesh import RULES, assert_even, sharding
from ppojax.models.attention import Cache, Packing
from ppojax.models.critic import Critic
from ppojax.models.decoder import Decoder, Hidden
from ppojax.models.hints import back, with_hints
from ppojax.models.lora import LoRAConfig, combine, row_keys, split
from ppojax.models.perturb import Noise, Perturbation
from ppojax.models.spec import AttentionChoice, DecoderSpec, Remat, StatisticsChoice
from ppojax.models.value_head import ValueHead
from ppojax.types import Experience, Layout, Routing, TokenStats

Params = dict[str, Any]
PLAIN = Layout()
FLOAT32 = {"value_head", "router", "router_bias", "choice_bias"}  # computed in float32, whatever the compute type


@dataclass(frozen=True)
class ModelDef:
    """All of a model but its numbers: a static argument of jit.

    With `count` over 1 it is that many critics, and every parameter that is trained has a leading axis over them.
    """

    spec: DecoderSpec
    dtype: str = "float32"
    remat: Remat = "full"
    head: ValueHead | None = None  # what values are read by; None for a policy
    count: int = 1
    attention: AttentionChoice = "xla"
    statistics: StatisticsChoice | None = None  # what computes token statistics; None: the default
    lora: LoRAConfig | None = None  # adapters are trained, all else but a value head is frozen
    mesh: jax.sharding.Mesh | None = None  # where it runs; experts need it to send tokens between devices

    @property
    def member(self) -> ModelDef:
        """One critic of an ensemble."""
        return replace(self, count=1)


@lru_cache(maxsize=32)
def _structure(model: ModelDef) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: _module(model, jax.random.key(0))))


def graphdef(model: ModelDef) -> nnx.GraphDef:
    """The structure of the model's `flax.nnx` module."""
    return _structure(model)[0]


def _module(model: ModelDef, key: jax.Array) -> nnx.Module:
    rngs = nnx.Rngs(key, lora=jax.random.fold_in(key, 1))
    if model.head is None:
        return Decoder(model.spec, rngs, model.lora)
    return Critic(model.spec, model.head, rngs, model.lora)


def compute_type(model: ModelDef, path: tuple) -> str | None:
    """The type in which the parameter at a path of the tree is read; None for its own."""
    return None if path[-1].key in FLOAT32 else model.dtype


def _bind(model: ModelDef, params: Params) -> Any:
    """Put parameters, cast to the compute type, back into their module; a value head and routers stay float32."""
    graphdef, abstract = _structure(model)

    def one(path: tuple, p: jax.Array) -> jax.Array:
        dtype = compute_type(model, path)
        return p if dtype is None else p.astype(dtype)

    cast = jax.tree_util.tree_map_with_path(one, params)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, cast)
    return nnx.merge(graphdef, state)


def init(model: ModelDef, key: jax.Array) -> Params:
    """Draw fresh parameters (float32), for each critic its own; what is frozen they share."""

    def one(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(_module(model, key)))

    return one(key) if model.count == 1 else join([one(k) for k in jax.random.split(key, model.count)], model.lora)


def join(members: list[Params], lora: LoRAConfig | None = None) -> Params:
    """Put the parameters of critics together: on a new leading axis, or the first one's where they are frozen."""
    trained = [split(member, lora)[0] for member in members]
    return combine(split(members[0], lora)[1], jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained))


def with_adapters(model: ModelDef, base: Params, dtype: str, key: jax.Array) -> Params:
    """Keep the weights of a decoder in the type of frozen ones, and put new adapters beside them."""
    assert model.lora is not None and model.head is None and model.count == 1
    # Compiled, so that of the whole model only the adapters are ever drawn.
    new = jax.jit(lambda k: split(init(model, k), model.lora)[0])(key)
    return combine(jax.tree.map(lambda p: p.astype(dtype), base), new)


def abstract_params(model: ModelDef) -> Params:
    """Shapes and types of the master weights, of one critic where there are more."""
    return nnx.to_pure_dict(_structure(model)[1])


def param_shardings(model: ModelDef, mesh: jax.sharding.Mesh, rules: Mapping[str, tuple[str, ...]] = RULES) -> Params:
    """The sharding of each parameter on a mesh, from the logical axes that it declares."""
    state = _structure(model)[1]
    axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    trained, frozen = split(nnx.to_pure_dict(axes), model.lora)
    members = () if model.count == 1 else (None,)

    def place(axes: Params, before: tuple = ()) -> Params:
        return jax.tree.map(lambda a: sharding(mesh, before + a, rules), axes, is_leaf=lambda a: isinstance(a, tuple))

    return combine(place(frozen), place(trained, members))


def head_VD(params: Params) -> jax.Array:
    """The output head `[V, D]`: its own matrix, or the embedding where they are tied."""
    return params["head"] if "head" in params else params["embed"]


def logits(model: ModelDef, head_VD: jax.Array, hidden_BD: jax.Array) -> jax.Array:
    """Logits of the next token, `[..., V]` float32, from a head in the compute type; capped where the model does."""
    z = jnp.einsum("...d,vd->...v", hidden_BD, head_VD, preferred_element_type=jnp.float32)
    return cap_logits(z, model.spec.logit_softcap)


def hidden_states(
    model: ModelDef,
    params: Params,
    token_BT: jax.Array,
    position_BT: jax.Array,
    cache: Cache | None = None,
    packing: Packing | None = None,
    routed: jax.Array | None = None,
    valid_BT: jax.Array | None = None,
    key_B: jax.Array | None = None,
    noise: Noise | None = None,
) -> Hidden:
    """Final hidden states of `token_BT`, the tokens' keys and values, and their routing (see `Decoder.__call__`)."""
    bound = _bind(model, params)
    decoder = bound if model.head is None else bound.trunk
    return decoder(
        token_BT,
        position_BT,
        cache,
        packing,
        routed,
        valid_BT=valid_BT,
        mesh=model.mesh,
        remat=model.remat,
        choice=model.attention,
        key_B=key_B,
        noise=noise,
    )


def positions(token_BT: jax.Array) -> jax.Array:
    """0, 1, 2, ... along each row."""
    return jnp.broadcast_to(jnp.arange(token_BT.shape[1], dtype=jnp.int32), token_BT.shape)


class Read(NamedTuple):
    """What a pass over rows found."""

    before_BRD: jax.Array  # at [:, i] the state in which the token at `offset_B + i` was chosen
    offset_B: jax.Array
    routing: Routing | None = None  # without experts there is none


def read_rows(
    model: ModelDef,
    params: Params,
    experience: Experience,
    layout: Layout,
    key: jax.Array | None = None,
    perturbation: Perturbation | None = None,
) -> Read:
    """Hidden state of the token before each position, from the first action on.

    Where rows share a prefix it is read once and its keys and values stand in for it in every row of the group:
    with 8 rollouts of a 60-token prompt and 40 tokens each, 380 positions instead of 800. The numbers are the same.
    Tokens go to the experts in `experience.routed_BTLK`, where it is there. Padding and failed rows count as no load.
    With a `key` the adapters drop inputs, of a group's rows by its first row. With a `perturbation` what blocks read is
    noisy: each row has its own noise, but for a prompt that is read once, which has its first row's.
    """
    token_BT, routed_BTLK = experience.token_BT, experience.routed_BTLK
    length_B = jnp.where(experience.valid_B, experience.length_B, 0)  # as far as load goes
    episode_P, segment_P = experience.episode_B[:: layout.group], experience.segment_B[:: layout.group]
    key_P = None if key is None else row_keys(key, episode_P, segment_P)
    if layout.group == 1:
        position_BT = positions(token_BT)
        routed, valid_BT = by_layer(routed_BTLK), position_BT < length_B[:, None]
        noise = None if perturbation is None else perturbation.noise(experience, position_BT)
        hidden_BTD, _, routing = hidden_states(
            model, params, token_BT, position_BT, None, None, routed, valid_BT if model.spec.moe else None, key_P, noise
        )
        before_BTD = jnp.pad(hidden_BTD[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return Read(before_BTD, jnp.zeros_like(experience.prefix_B), routing)
    prefix, group, prefix_B = layout.prefix, layout.group, experience.prefix_B
    B, R = token_BT.shape[0], token_BT.shape[1] - prefix
    assert_even("groups", B // group, model.mesh)
    position_BR = prefix_B[:, None] + jnp.arange(R, dtype=jnp.int32)[None, :]
    response_BR = jnp.take_along_axis(token_BT, position_BR, axis=1)

    def packed(prompt_PT: jax.Array, rows_BR: jax.Array) -> jax.Array:
        behind_PN = rows_BR.reshape(B // group, group * R, *rows_BR.shape[2:])
        return jnp.concatenate([prompt_PT, behind_PN], axis=1)

    prompt_PT = token_BT[::group, :prefix]
    position_PT = positions(prompt_PT)
    token_PN, position_PN = packed(prompt_PT, response_BR), packed(position_PT, position_BR)
    routed = valid_PN = None
    if routed_BTLK is not None:
        routed_BRLK = jnp.take_along_axis(routed_BTLK, position_BR[:, :, None, None], axis=1)
        routed = by_layer(packed(routed_BTLK[::group, :prefix], routed_BRLK))
    if model.spec.moe is not None:
        shared_P = jnp.max(jnp.minimum(prefix_B, length_B).reshape(-1, group), axis=1)
        valid_PN = packed(position_PT < shared_P[:, None], position_BR < length_B[:, None])
    noise = None if perturbation is None else perturbation.shared(experience, position_PT, position_BR)
    hidden_PND, _, routing = hidden_states(
        model, params, token_PN, position_PN, None, Packing(prefix, group), routed, valid_PN, key_P, noise
    )
    last_P = jnp.maximum(prefix_B[::group] - 1, 0)
    last_PD = jnp.take_along_axis(hidden_PND, last_P[:, None, None], axis=1)
    response_BRD = hidden_PND[:, prefix:].reshape(B, R, -1)
    before_BRD = jnp.concatenate([jnp.repeat(last_PD, group, axis=0), response_BRD[:, :-1]], axis=1)
    return Read(before_BRD, prefix_B, routing)


def by_layer(routed_BTLK: jax.Array | None) -> jax.Array | None:
    """A record of experts as the decoder takes it, int32 `[L, B, T, K]`."""
    return None if routed_BTLK is None else jnp.moveaxis(routed_BTLK, 2, 0).astype(jnp.int32)


class Heads(NamedTuple):
    """Heads of other policies, `[V, D]` in the compute type, which the policy is compared with over the vocabulary."""

    behavior: jax.Array | None = None  # of the sampler, for the hidden states that it recorded
    reference: jax.Array | None = None  # of the frozen reference policy, for `hidden_ref_BAD`


ALONE = Heads()


def action_states(
    model: ModelDef,
    params: Params,
    experience: Experience,
    layout: Layout,
    key: jax.Array | None = None,
    perturbation: Perturbation | None = None,
) -> tuple[jax.Array, Routing | None]:
    """Hidden state in which each action was chosen, `[B, A, D]`, of no meaning at filler positions; and the routing."""
    before_BRD, offset_B, routing = read_rows(model, params, experience, layout, key, perturbation)
    place_BA = jnp.maximum(experience.action_index_BA - offset_B[:, None], 0)
    return jnp.take_along_axis(before_BRD, place_BA[:, :, None], axis=1), routing


def score_tokens(
    model: ModelDef,
    params: Params,
    experience: Experience,
    layout: Layout = PLAIN,
    *,
    temperature: float,
    entropy: bool = False,
) -> TokenStats:
    """Score the actions of each row under the policy (see `score_and_route`)."""
    return score_and_route(model, params, experience, layout, temperature=temperature, entropy=entropy)[0]


def score_and_route(
    model: ModelDef,
    params: Params,
    experience: Experience,
    layout: Layout = PLAIN,
    *,
    temperature: float,
    entropy: bool = False,
    key: jax.Array | None = None,
    heads: Heads = ALONE,
    perturbation: Perturbation | None = None,
) -> tuple[TokenStats, Routing | None]:
    """Score the actions of each row under the policy, aligned with their tokens, 0 elsewhere; and its routing.

    `logp_BT[:, t] = log softmax(logits(hidden[:, t-1]) / temperature)[token[:, t]]`. Only action positions meet the
    head, and the vocabulary is never held for all of them at once. With a `key` the adapters drop inputs, and with a
    `perturbation` what blocks read is noisy.

    With `heads.behavior` also `tv` and `reverse_kl` = KL(sampler || policy), without gradient; with `heads.reference`
    also `kl_ref` = KL(policy || reference); and `topk_logp`, over actions `[B, A, K]`, where tokens are recorded.
    """
    hidden_BAD, routing = action_states(model, params, experience, layout, key, perturbation)
    how = partial(
        token_stats,
        temperature=temperature,
        softcap=model.spec.logit_softcap,
        implementation=model.statistics,
        mesh=model.mesh,
    )
    stats = _statistics(how, hidden_BAD, head_VD(params).astype(model.dtype), experience, entropy, heads)
    index_BA, topk_NK = experience.action_index_BA, stats.topk_logp

    def align(x_N: jax.Array) -> jax.Array:
        return to_tokens(x_N.reshape(index_BA.shape), index_BA, experience.token_BT.shape[1])

    aligned = jax.tree.map(align, stats._replace(topk_logp=None))
    return aligned._replace(topk_logp=None if topk_NK is None else topk_NK.reshape(*index_BA.shape, -1)), routing


def _statistics(
    how: Callable[..., TokenStats],
    hidden_BAD: jax.Array,
    head_VD: jax.Array,
    experience: Experience,
    entropy: bool,
    heads: Heads,
) -> TokenStats:
    """The statistics of each action position, `[B A]`."""
    recorded = experience.recorded

    def flat(x_BA: jax.Array | None) -> jax.Array:
        assert x_BA is not None, "a policy is compared with another one whose hidden states were not kept"
        return x_BA.reshape(-1, *x_BA.shape[2:])

    hidden_ND, target_N = flat(hidden_BAD), flat(at_actions(experience.token_BT, experience.action_index_BA))
    stats = how(
        hidden_ND,
        head_VD,
        target_N,
        entropy=entropy,
        topk_id_NK=None if recorded.top_id is None else flat(recorded.top_id),
        reference=None if heads.reference is None else (flat(experience.hidden_ref_BAD), heads.reference),
        kl=heads.reference is not None,
    )
    stats = stats._replace(kl=None, kl_ref=stats.kl)
    if heads.behavior is None:
        return stats
    # Of constants, in a call of its own: it decides a mask, and the backward pass need not know of it.
    held = jax.lax.stop_gradient((hidden_ND, head_VD))
    other = (flat(recorded.hidden), heads.behavior)
    gap = how(*held, target_N, reference=other, reverse_kl=True, tv=True)
    return stats._replace(reverse_kl=gap.reverse_kl, tv=gap.tv)


class Prediction(NamedTuple):
    """What critics say of each state, float32."""

    value_MBT: jax.Array
    output_MBTK: jax.Array  # of the value head: what its loss is made of


def values(model: ModelDef, params: Params, experience: Experience, layout: Layout = PLAIN) -> jax.Array:
    """Value of the state in which each token was chosen, `[M, B, T]` float32 (see `predict`)."""
    return predict(model, params, experience, layout).value_MBT


def predict(
    model: ModelDef, params: Params, experience: Experience, layout: Layout = PLAIN, key: jax.Array | None = None
) -> Prediction:
    """Read the critics: the value of the state in which each token was chosen, and what it was computed from.

    `[:, :, t]` reads the hidden state of token t - 1, so it does not see token t. Positions inside a shared prefix,
    which no estimator reads, get 0. With a `key`, which only a lone critic takes, the adapters drop inputs. Where rows
    have hints, the critics read them before the row.
    """
    if model.count > 1:
        assert key is None, "an ensemble drops nothing: its members take their keys alone"
        trained, frozen = split(params, model.lora)
        parts = jax.lax.map(lambda p: predict(model.member, combine(frozen, p), experience, layout), trained)
        return jax.tree.map(lambda x: x[:, 0], parts)
    assert model.head is not None, "a policy has no values"
    seen, layout = with_hints(experience._replace(routed_BTLK=None), layout)
    before_BRD, offset_B, _ = read_rows(model, params, seen, layout, key)
    output_BRK = _bind(model, params).outputs(before_BRD)
    place_BT = positions(seen.token_BT) - offset_B[:, None]
    inside_BT = (place_BT >= 0) & (place_BT < before_BRD.shape[1])
    place_BT1 = jnp.clip(place_BT, 0, before_BRD.shape[1] - 1)[:, :, None]
    output_BTK = jnp.where(inside_BT[:, :, None], jnp.take_along_axis(output_BRK, place_BT1, axis=1), 0.0)
    value_BT = jnp.where(inside_BT, model.head.value(output_BTK), 0.0)
    return Prediction(back(value_BT, experience)[None], back(output_BTK, experience)[None])
