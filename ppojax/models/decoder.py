"""The decoder: RMSNorm, rotary positions, grouped-query or latent attention, a gated MLP or experts.

Blocks are stacked and scanned. What differs between them (a sliding window, no positions) goes through the scan as an
index into the few kinds of blocks, so that compile time does not grow with depth. What a spec does not ask for is not
computed: the choices are Python's, made while tracing.

The module ends at the final norm: the head stays outside, so that kernels can own logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.mesh import RULES, sharding
from ppojax.models import parameters
from ppojax.models.activation import gated
from ppojax.models.attention import Cache, KeyValue, Masks, Packing, Scores, attention, masks
from ppojax.models.flash import flash, use_flash
from ppojax.models.linear import linear
from ppojax.models.lora import LoRAConfig, drop
from ppojax.models.moe import CHOICE, mix
from ppojax.models.perturb import Noise, perturbed
from ppojax.models.rope import Turn, rotary, rotate
from ppojax.models.spec import AttentionChoice, DecoderSpec, Remat
from ppojax.types import Routing

Flash = Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]


class Hidden(NamedTuple):
    """What a decoder returns."""

    hidden_BTD: jax.Array  # after the final norm
    key_value: KeyValue  # of the tokens that were read
    routing: Routing | None = None  # of the blocks with experts, stacked; None without experts


class Kind(NamedTuple):
    """What may differ between the blocks of a model."""

    windowed: bool
    rotated: bool


class Sight(NamedTuple):
    """What the tokens see in blocks of one kind, and how their queries and keys are turned (None: not at all)."""

    masks: Masks
    turn: Turn | None


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: bool = False) -> jax.Array:
    """x / sqrt(mean x^2 + eps) * weight, in float32 (arXiv 1910.07467); `offset`: times 1 + weight (Gemma)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight32 = weight.astype(jnp.float32) + 1.0 if offset else weight.astype(jnp.float32)
    return (x32 * weight32.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rematerialised(block: Callable, remat: Remat) -> Callable:
    """Choose what of a block is kept for its backward pass: everything, the matrix products, or its input only.

    The choice of experts is always kept: computed again, it might be another one.
    """
    if remat == "none":
        return block
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(CHOICE)
    if remat == "dots":
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policy)
    return jax.checkpoint(block, prevent_cse=False, policy=policy)


def by_rows(x_BTD: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Keep the stream between blocks split by rows alone, where they split evenly.

    Otherwise it takes the embedding's split along the width, and XLA sums activations over fsdp instead of gathering
    weights: 25 times the bytes in an update of 1.5B parameters on 8 devices, as compiled.
    """
    if mesh is None or mesh.size == 1 or x_BTD.shape[0] % math.prod(mesh.shape[axis] for axis in RULES["rows"]):
        return x_BTD
    return jax.lax.with_sharding_constraint(x_BTD, sharding(mesh, ("rows", None, None)))


def block_kinds(spec: DecoderSpec) -> list[Kind]:
    """The kind of every block."""
    windowed = spec.windowed or (False,) * spec.layers
    unrotated = spec.unrotated or (False,) * spec.layers
    return [Kind(w, not u) for w, u in zip(windowed, unrotated, strict=True)]


def sights_of(
    spec: DecoderSpec, kinds: list[Kind], position_BT: jax.Array, slots: int, packing: Packing | None
) -> list[Sight]:
    """The sight of each kind of block; shared parts are made once."""
    seen = {w: masks(position_BT, slots, packing, spec.window if w else None) for w in {k.windowed for k in kinds}}
    turns: dict[Kind, Turn | None] = dict.fromkeys(kinds)
    for kind in kinds:
        if kind.rotated:
            rope = spec.local_rope if kind.windowed and spec.local_rope is not None else spec.rope
            turns[kind] = rotary(position_BT, spec.rope_width, rope)
    if any(k.rotated for k in kinds):
        # Beside blocks with positions, those without are turned by nothing: all sights have one structure.
        cos, sin = next(turn for turn in turns.values() if turn is not None)
        turns = {k: (jnp.ones_like(cos), jnp.zeros_like(sin)) if t is None else t for k, t in turns.items()}
    return [Sight(seen[k.windowed], turns[k]) for k in kinds]


def flash_of(spec: DecoderSpec, kinds: list[Kind], kind: jax.Array | None) -> Flash:
    """Flash attention of a block, with the window of its kind; `kind` is None where there is only one."""
    windows = [spec.window if k.windowed else None for k in kinds]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
        if kind is None or len(set(windows)) == 1:
            return flash(q, k, v, scale=scale, window=windows[0])
        return jax.lax.switch(kind, [partial(flash, scale=scale, window=w) for w in windows], q, k, v)

    return attend


@dataclass(frozen=True)
class Block:
    """One transformer block: its slice of the parameters, applied."""

    spec: DecoderSpec
    weight: dict[str, Any]
    valid_BT: jax.Array | None = None  # tokens that count as load of the experts; None: all
    mesh: jax.sharding.Mesh | None = None  # over which tokens travel to their experts
    flash: Flash | None = None  # attends in place of `attention`
    lora: LoRAConfig | None = None
    key_B: jax.Array | None = None  # of the adapters' dropout; None: nothing is dropped

    def __call__(
        self, x_BTD: jax.Array, sight: Sight, cache: Cache | None, packing: Packing | None, routed: jax.Array | None
    ) -> tuple[jax.Array, tuple[KeyValue, Routing | None]]:
        """Apply the block; return the new tokens' keys and values, and their routing, too."""
        h = self.norm("attn_norm", x_BTD)
        q, k, v = self.grouped_query(h, sight.turn) if self.spec.mla is None else self.latent(h, sight.turn)
        scores = self.scores()
        if self.flash is None:
            h = attention(q, k, v, cache, sight.masks, packing, scores)
        else:
            h = self.flash(q, k, v, scores.scale)
        h = self.project("o", h)
        x_BTD = x_BTD + (self.norm("post_attn_norm", h) if self.spec.sandwich else h)
        h, routing = self.feed_forward(self.norm("mlp_norm", x_BTD), routed)
        x_BTD = x_BTD + (self.norm("post_mlp_norm", h) if self.spec.sandwich else h)
        return by_rows(x_BTD, self.mesh), (KeyValue(k, v), routing)

    def project(self, name: str, x: jax.Array) -> jax.Array:
        """x w, and a bias and an adapter where there are. Every matrix outside of the experts is applied here."""
        y = linear(x, self.weight[name])
        pair = self.weight.get("lora", {}).get(name)
        if pair is not None:
            assert self.lora is not None, "parameters with adapters for a model without"
            # Added to the bare product: what follows is compiled as it is without adapters, to the same bits.
            seen = x if self.key_B is None else drop(x, self.key_B, name, self.lora.dropout)
            y = y + linear(linear(seen, pair["a"]) * self.lora.scale, pair["b"])
        if f"{name}_bias" in self.weight:
            y = y + self.weight[f"{name}_bias"].reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        """RMSNorm with the weight of that name."""
        return rms_norm(x, self.weight[name], self.spec.norm_eps, self.spec.norm_offset)

    def scores(self) -> Scores:
        """How this block's attention forms its scores."""
        spec = self.spec
        scale = 1.0 / math.sqrt(spec.key_width) if spec.attention_scale is None else spec.attention_scale
        return Scores(scale, spec.attention_softcap, self.weight["sinks"] if spec.sinks else None)

    def grouped_query(self, h_BTD: jax.Array, turn: Turn | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, T, H, F]`, keys and values `[B, T, Kh, F]` (arXiv 2305.13245)."""
        spec, (B, T, _) = self.spec, h_BTD.shape
        q = self.project("q", h_BTD).reshape(B, T, spec.heads, spec.head_width)
        k = self.project("k", h_BTD).reshape(B, T, spec.kv_heads, spec.head_width)
        v = self.project("v", h_BTD).reshape(B, T, spec.kv_heads, spec.head_width)
        if spec.qk_norm:
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        return (q, k, v) if turn is None else (rotate(q, turn), rotate(k, turn), v)

    def latent(self, h_BTD: jax.Array, turn: Turn | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys `[B, T, H, nope + rope]`, values `[B, T, H, value]` (arXiv 2405.04434, section 2.1).

        Keys and values are expanded from their latent for every head, and so they are cached.
        """
        spec, mla, (B, T, _) = self.spec, self.spec.mla, h_BTD.shape
        assert mla is not None
        q = h_BTD if mla.q_rank is None else self.norm("q_a_norm", self.project("q_a", h_BTD))
        q = self.project("q" if mla.q_rank is None else "q_b", q).reshape(B, T, spec.heads, -1)
        kv_latent, k_rope = jnp.split(self.project("kv_a", h_BTD), [mla.kv_rank], axis=-1)
        kv = self.project("kv_b", self.norm("kv_a_norm", kv_latent)).reshape(B, T, spec.heads, -1)
        k_nope, v = jnp.split(kv, [mla.nope_width], axis=-1)
        q_nope, q_rope = jnp.split(q, [mla.nope_width], axis=-1)
        k_rope = k_rope[:, :, None, :]
        if turn is not None:
            q_rope, k_rope = rotate(q_rope, turn), rotate(k_rope, turn)
        k_rope = jnp.broadcast_to(k_rope, (B, T, spec.heads, mla.rope_width))
        return jnp.concatenate([q_nope, q_rope], axis=-1), jnp.concatenate([k_nope, k_rope], axis=-1), v

    def feed_forward(self, h_BTD: jax.Array, routed_BTK: jax.Array | None) -> tuple[jax.Array, Routing | None]:
        """The gated MLP; or the experts, beside those that every token goes to, and what the router did."""
        if "router" not in self.weight:
            return self.gated_mlp("", h_BTD), None
        spec, (B, T, D) = self.spec.moe, h_BTD.shape
        assert spec is not None
        y_ND, routing = mix(
            h_BTD.reshape(B * T, D),
            self.weight,
            spec,
            self.spec.activation,
            routed_NK=None if routed_BTK is None else routed_BTK.reshape(B * T, spec.chosen),
            valid_N=None if self.valid_BT is None else self.valid_BT.reshape(B * T),
            mesh=self.mesh,
        )
        y_BTD = y_ND.reshape(B, T, D)
        if spec.shared_ffn:
            y_BTD = y_BTD + self.gated_mlp("shared_", h_BTD)
        return y_BTD, routing._replace(expert_NK=routing.expert_NK.reshape(B, T, spec.chosen))

    def gated_mlp(self, prefix: str, h_BTD: jax.Array) -> jax.Array:
        """down(act(gate h) * up h) with the matrices that have this prefix."""
        gate, up = self.project(f"{prefix}gate", h_BTD), self.project(f"{prefix}up", h_BTD)
        return self.project(f"{prefix}down", gated(self.spec.activation, gate, up))


class Layers(nnx.Module):
    """A stack of equal blocks: parameters carry a leading layer axis, over which `Decoder` scans."""

    def __init__(
        self, spec: DecoderSpec, rngs: nnx.Rngs, blocks: range, experts: bool, lora: LoRAConfig | None
    ) -> None:
        self.blocks = blocks  # where the stack stands among the model's blocks
        for name, leaf in parameters.block(spec, experts).items():
            setattr(self, name, parameters.create(rngs, leaf, len(blocks)))
        if lora is not None:
            # A stream of their own: the base is the same with adapters and without.
            own = nnx.Rngs(rngs.lora())
            self.lora = nnx.Dict(
                {
                    name: nnx.Dict({x: parameters.create(own, leaf, len(blocks)) for x, leaf in pair.items()})
                    for name, pair in parameters.adapters(spec, experts, lora).items()
                }
            )


class Decoder(nnx.Module):
    """Tokens to final hidden states."""

    def __init__(self, spec: DecoderSpec, rngs: nnx.Rngs, lora: LoRAConfig | None = None) -> None:
        self.spec, self.lora = spec, lora
        self.embed = parameters.create(rngs, parameters.embedding(spec))
        dense = 0 if spec.moe is None else spec.moe.dense_first
        if dense:
            self.dense_layers = Layers(spec, rngs, range(dense), experts=False, lora=lora)
        self.layers = Layers(spec, rngs, range(dense, spec.layers), experts=spec.moe is not None, lora=lora)
        self.norm = parameters.create(rngs, parameters.norm(spec, spec.width))
        if not spec.tied:
            self.head = parameters.create(rngs, parameters.embedding(spec))

    def __call__(
        self,
        token_BT: jax.Array,
        position_BT: jax.Array,
        cache: Cache | None = None,
        packing: Packing | None = None,
        routed: jax.Array | None = None,
        *,
        valid_BT: jax.Array | None = None,
        mesh: jax.sharding.Mesh | None = None,
        remat: Remat = "none",
        choice: AttentionChoice = "xla",
        key_B: jax.Array | None = None,
        noise: Noise | None = None,
    ) -> Hidden:
        """Run the blocks over `token_BT`, whose tokens stand at `position_BT` of their rows.

        Rows are padded on the right: nothing real looks at padding. What a token sees: `ppojax.models.attention`.
        `routed` `[Lmoe, B, T, K]` names the experts that each token goes to; where it is -1 the router chooses. Tokens
        off `valid_BT` are in no sum of the routing. A `mesh` is needed where rows or experts lie on several devices.
        `choice` is what attends (`ppojax.models.flash`). With a `key_B` of each row adapters drop some of their inputs.
        `noise` is added to what each block reads.
        """
        spec, kinds = self.spec, block_kinds(self.spec)
        distinct = list(dict.fromkeys(kinds))
        sights = sights_of(spec, distinct, position_BT, 0 if cache is None else cache.k.shape[3], packing)
        cached, packed, dtype = cache is not None, packing is not None, self.embed[...].dtype.name
        flashing = use_flash(choice, spec, dtype, cached=cached, packed=packed)

        def block(x: jax.Array, layer: tuple) -> tuple[jax.Array, tuple[KeyValue, Routing | None]]:
            weight, kind, n, past, routed, sigma = layer
            x = x if noise is None else perturbed(x, sigma, noise.key_BT, n, noise.relative)
            if look_up:
                past = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, n, keepdims=False), cache)
            sight = sights[0] if kind is None else jax.tree.map(lambda *s: jax.lax.select_n(kind, *s), *sights)
            flash = flash_of(spec, distinct, kind) if flashing else None
            keys = None if key_B is None else jax.vmap(lambda key: jax.random.fold_in(key, n))(key_B)
            return Block(spec, weight, valid_BT, mesh, flash, self.lora, keys)(x, sight, past, packing, routed)

        x_BTD = by_rows(self.embed[...][token_BT], mesh)
        if spec.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(spec.embed_scale, x_BTD.dtype)
        stacks = [self.dense_layers, self.layers] if spec.moe is not None and spec.moe.dense_first else [self.layers]
        key_values, routing = [], None
        # One stack takes the cache block by block. Of two, each would take a part, which is a copy: they look it up.
        look_up = cache is not None and len(stacks) > 1
        for stack in stacks:
            kind_L = jnp.asarray([distinct.index(kinds[n]) for n in stack.blocks], jnp.int32)
            layers = (
                nnx.to_pure_dict(nnx.state(stack)),
                kind_L if len(distinct) > 1 else None,
                jnp.asarray(stack.blocks, jnp.int32) if look_up or key_B is not None or noise is not None else None,
                None if look_up else cache,
                routed if stack is self.layers else None,
                None if noise is None else noise.sigma[stack.blocks.start : stack.blocks.stop],
            )
            x_BTD, (key_value, routing) = jax.lax.scan(rematerialised(block, remat), x_BTD, layers)
            key_values.append(key_value)
        key_value = key_values[0] if len(stacks) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *key_values)
        return Hidden(rms_norm(x_BTD, self.norm[...], spec.norm_eps, spec.norm_offset), key_value, routing)
