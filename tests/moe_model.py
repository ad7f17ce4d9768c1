"""Tiny decoders with experts, one for each family that has them."""

from __future__ import annotations

import jax

from ppojax.models.forward import ModelDef, Params, init
from ppojax.models.spec import DecoderSpec, MLASpec, MoESpec

SHAPE = {"width": 16, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn": 24, "vocab": 48, "tied": False}
SPECS = {
    "qwen3_moe": DecoderSpec(**SHAPE, layers=2, qk_norm=True, moe=MoESpec(experts=8, chosen=2, ffn=8)),
    "gpt_oss": DecoderSpec(
        **SHAPE, layers=2, sinks=True, qkv_bias=True, o_bias=True, window=4, windowed=(True, False),
        activation="clipped_swiglu",
        moe=MoESpec(experts=8, chosen=2, ffn=8, scoring="softmax_chosen", router_bias=True, expert_bias=True),
    ),
    "deepseek_v3": DecoderSpec(
        **{**SHAPE, "kv_heads": 4}, layers=3,
        mla=MLASpec(q_rank=8, kv_rank=8, nope_width=4, rope_width=4, value_width=4),
        moe=MoESpec(
            experts=8, chosen=2, ffn=8, shared_ffn=8, dense_first=1, scoring="sigmoid", groups=4, groups_chosen=2,
            scale=2.5, choice_bias=True,
        ),
    ),
}  # fmt: skip


def drawn(spec: DecoderSpec, seed: int = 0) -> Params:
    """Parameters in which nothing is zero or one, so that what is left out shows."""
    params = init(ModelDef(spec), jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), params)
