"""The parameters of a decoder: one table gives their names, shapes, logical axes and start."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.errors import ConfigError
from ppojax.models.lora import LoRAConfig
from ppojax.models.spec import DecoderSpec, MLASpec, MoESpec


class Leaf(NamedTuple):
    """One parameter (of one block, without the leading layer axis). Matrices are [in, out]."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, see `ppojax.mesh.RULES`
    std: float | None = None  # of its normal start; None: it starts at `fill`
    fill: float = 0.0


def create(rngs: nnx.Rngs, leaf: Leaf, layers: int | None = None) -> nnx.Param:
    """Create a float32 parameter, stacked over `layers` blocks when that is given."""
    shape = leaf.shape if layers is None else (layers, *leaf.shape)
    axes = leaf.axes if layers is None else (None, *leaf.axes)
    if leaf.std is None:
        return nnx.Param(jnp.full(shape, leaf.fill, jnp.float32), axes=axes)
    return nnx.Param(leaf.std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def norm(spec: DecoderSpec, width: int) -> Leaf:
    """The weight of an RMSNorm; it starts as the identity."""
    return Leaf((width,), (None,), fill=0.0 if spec.norm_offset else 1.0)


def embedding(spec: DecoderSpec) -> Leaf:
    """The embedding, and the head where it is not tied."""
    return Leaf((spec.vocab, spec.width), ("vocab", "embed"), 1.0 / math.sqrt(spec.width))


def block(spec: DecoderSpec, experts: bool) -> dict[str, Leaf]:
    """Every parameter of one block, with experts or with a dense MLP."""
    leaves = {"attn_norm": norm(spec, spec.width)}
    leaves |= _grouped_query(spec) if spec.mla is None else _latent(spec, spec.mla)
    out_in = spec.heads * spec.value_width
    leaves["o"] = Leaf((out_in, spec.width), ("heads", "embed"), _back(spec, out_in))
    if spec.o_bias:
        leaves["o_bias"] = Leaf((spec.width,), (None,))
    if spec.sinks:
        leaves["sinks"] = Leaf((spec.heads,), ("heads",))
    if spec.sandwich:
        leaves["post_attn_norm"] = norm(spec, spec.width)
    leaves["mlp_norm"] = norm(spec, spec.width)
    if experts:
        assert spec.moe is not None
        leaves |= _experts(spec, spec.moe)
    else:
        leaves |= _gated(spec, "", spec.ffn)
        if spec.mlp_bias:
            leaves |= {f"{name}_bias": Leaf((spec.ffn,), ("ffn",)) for name in ("gate", "up")}
            leaves["down_bias"] = Leaf((spec.width,), (None,))
    if spec.sandwich:
        leaves["post_mlp_norm"] = norm(spec, spec.width)
    return leaves


def adapters(spec: DecoderSpec, experts: bool, lora: LoRAConfig) -> dict[str, dict[str, Leaf]]:
    """The adapters of one block, by matrix.

    `a` has the deviation of PEFT's start, uniform within 1 / sqrt(in); `b` is zero, so that nothing changes at first.
    """
    pairs = {}
    for name, leaf in block(spec, experts).items():
        projected = len(leaf.shape) == 2 and not name.startswith(("expert_", "router"))
        if projected and (lora.targets is None or name in lora.targets):
            (width_in, width_out), (axis_in, axis_out) = leaf.shape, leaf.axes
            pairs[name] = {
                "a": Leaf((width_in, lora.rank), (axis_in, None), 1.0 / math.sqrt(3 * width_in)),
                "b": Leaf((lora.rank, width_out), (None, axis_out)),
            }
    return pairs


def check_targets(spec: DecoderSpec, lora: LoRAConfig, where: str) -> None:
    """Raise ConfigError when a target of the adapters is no matrix of this model."""
    every = lora.model_copy(update={"targets": None})
    stacks = {False, True} if spec.moe is not None and spec.moe.dense_first else {spec.moe is not None}
    names = list(dict.fromkeys(name for experts in sorted(stacks) for name in adapters(spec, experts, every)))
    wrong = [name for name in lora.targets or () if name not in names]
    if wrong:
        raise ConfigError(f"{where}.targets: this model has no {', '.join(wrong)}; it has {', '.join(names)}")


def _into(spec: DecoderSpec) -> float:
    return 1.0 / math.sqrt(spec.width)


def _back(spec: DecoderSpec, width: int) -> float:
    """Products that write to the residual stream start smaller, by the number of writes (GPT-2)."""
    return 1.0 / math.sqrt(2 * spec.layers) / math.sqrt(width)


def _grouped_query(spec: DecoderSpec) -> dict[str, Leaf]:
    into, F = _into(spec), spec.head_width
    heads = {"q": (spec.heads, "heads"), "k": (spec.kv_heads, "kv_heads"), "v": (spec.kv_heads, "kv_heads")}
    leaves = {name: Leaf((spec.width, n * F), ("embed", axis), into) for name, (n, axis) in heads.items()}
    if spec.qkv_bias:
        leaves |= {f"{name}_bias": Leaf((n * F,), (axis,)) for name, (n, axis) in heads.items()}
    if spec.qk_norm:
        leaves |= {"q_norm": norm(spec, F), "k_norm": norm(spec, F)}
    return leaves


def _latent(spec: DecoderSpec, mla: MLASpec) -> dict[str, Leaf]:
    into, H = _into(spec), spec.heads
    key_width = mla.nope_width + mla.rope_width
    leaves: dict[str, Leaf] = {}
    if mla.q_rank is None:
        leaves["q"] = Leaf((spec.width, H * key_width), ("embed", "heads"), into)
    else:
        leaves["q_a"] = Leaf((spec.width, mla.q_rank), ("embed", None), into)
        leaves["q_a_norm"] = norm(spec, mla.q_rank)
        leaves["q_b"] = Leaf((mla.q_rank, H * key_width), (None, "heads"), 1.0 / math.sqrt(mla.q_rank))
    leaves["kv_a"] = Leaf((spec.width, mla.kv_rank + mla.rope_width), ("embed", None), into)
    leaves["kv_a_norm"] = norm(spec, mla.kv_rank)
    kv_out = H * (mla.nope_width + mla.value_width)
    leaves["kv_b"] = Leaf((mla.kv_rank, kv_out), (None, "heads"), 1.0 / math.sqrt(mla.kv_rank))
    return leaves


def _gated(spec: DecoderSpec, prefix: str, ffn: int) -> dict[str, Leaf]:
    return {
        f"{prefix}gate": Leaf((spec.width, ffn), ("embed", "ffn"), _into(spec)),
        f"{prefix}up": Leaf((spec.width, ffn), ("embed", "ffn"), _into(spec)),
        f"{prefix}down": Leaf((ffn, spec.width), ("ffn", "embed"), _back(spec, ffn)),
    }


def _experts(spec: DecoderSpec, moe: MoESpec) -> dict[str, Leaf]:
    D, E, F, into = spec.width, moe.experts, moe.ffn, _into(spec)
    leaves = {"router": Leaf((D, E), ("embed", None), into)}
    if moe.router_bias:
        leaves["router_bias"] = Leaf((E,), (None,))
    if moe.choice_bias:
        leaves["choice_bias"] = Leaf((E,), (None,))
    leaves["expert_gate"] = Leaf((E, D, F), ("experts", "embed", "ffn"), into)
    leaves["expert_up"] = Leaf((E, D, F), ("experts", "embed", "ffn"), into)
    leaves["expert_down"] = Leaf((E, F, D), ("experts", "ffn", "embed"), _back(spec, F))
    if moe.expert_bias:
        leaves |= {f"expert_{name}_bias": Leaf((E, F), ("experts", "ffn")) for name in ("gate", "up")}
        leaves["expert_down_bias"] = Leaf((E, D), ("experts", None))
    if moe.shared_ffn:
        leaves |= _gated(spec, "shared_", moe.shared_ffn)
    return leaves
