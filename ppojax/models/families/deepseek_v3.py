"""DeepSeek-V3 (arXiv 2412.19437): latent attention, sigmoid routing in groups with a choice bias, shared experts.

The files interleave the two halves of each rotated pair; here they lie one behind the other ("rotate half").
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ppojax.models.families.config import HFConfig, common_config, rope_parameters, yarn_scale
from ppojax.models.families.family import Family
from ppojax.models.families.layout import ATTENTION, EXPERTS, LAYER, MLP, TOP, Rule, Rules, named
from ppojax.models.spec import DecoderSpec, MLASpec, MoESpec, RopeSpec


def _scale(config: HFConfig, rope: RopeSpec, key_width: int) -> float | None:
    """Factor on scores where yarn raises it: mscale^2 / sqrt(key width)."""
    every = config.rope_settings().get("mscale_all_dim")
    if rope.scaling == "none" or not every:
        return None
    return yarn_scale(rope.factor, every) ** 2 / math.sqrt(key_width)


def spec_from(config: HFConfig) -> DecoderSpec:
    """Read the config. The norms of the latents have an epsilon of 1e-6 whatever it says, so the others must too."""
    config.expect({"hidden_act": "silu", "attention_bias": False, "rope_interleave": True, "rms_norm_eps": 1e-6})
    config.expect({"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    rope, heads = config.rope(10_000.0), config.integer("num_attention_heads")
    nope, turned = config.integer("qk_nope_head_dim", 128), config.integer("qk_rope_head_dim", 64)
    ffn = config.integer("moe_intermediate_size", 2048)
    return DecoderSpec(
        **config.sizes(),
        heads=heads,
        kv_heads=heads,
        head_width=nope + turned,
        rope=rope,
        norm_eps=1e-6,
        tied=config.get("tie_word_embeddings", False),
        attention_scale=_scale(config, rope, nope + turned),
        mla=MLASpec(
            q_rank=config.values.get("q_lora_rank", 1536),
            kv_rank=config.integer("kv_lora_rank", 512),
            nope_width=nope,
            rope_width=turned,
            value_width=config.integer("v_head_dim", 128),
        ),
        moe=MoESpec(
            experts=config.integer("n_routed_experts", config.get("num_local_experts", 256)),
            chosen=config.integer("num_experts_per_tok", 8),
            ffn=ffn,
            shared_ffn=ffn * config.integer("n_shared_experts", 1),
            dense_first=config.get("first_k_dense_replace", 3),
            scoring="sigmoid",
            normalise=config.get("norm_topk_prob", True),
            groups=config.integer("n_group", 8),
            groups_chosen=config.integer("topk_group", 4),
            scale=config.get("routed_scaling_factor", 2.5),
            choice_bias=True,
        ),
    )


def config_from(spec: DecoderSpec) -> dict[str, Any]:
    """Write the config."""
    moe = spec.moe or MoESpec(experts=1, chosen=1, ffn=1)
    mla = spec.mla or MLASpec(kv_rank=1, nope_width=1, rope_width=2, value_width=1)
    ropes = _yarn_config(spec)
    return common_config("deepseek_v3", "DeepseekV3ForCausalLM", spec) | {
        "head_dim": mla.rope_width,
        "qk_head_dim": spec.head_width,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_width,
        "qk_rope_head_dim": mla.rope_width,
        "v_head_dim": mla.value_width,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.chosen,
        "moe_intermediate_size": moe.ffn,
        "n_shared_experts": moe.shared_ffn // moe.ffn,
        "first_k_dense_replace": moe.dense_first,
        "norm_topk_prob": moe.normalise,
        "n_group": moe.groups,
        "topk_group": moe.groups_chosen,
        "routed_scaling_factor": moe.scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
        "rope_parameters": ropes,
        "rope_scaling": None if spec.rope.scaling == "none" else {k: v for k, v in ropes.items() if k != "rope_theta"},
    }


def _yarn_config(spec: DecoderSpec) -> dict[str, Any]:
    """Rotary positions, with DeepSeek's two mscales where scores are raised."""
    found = rope_parameters(spec.rope)
    if spec.attention_scale is None or spec.rope.factor <= 1:
        return found
    raised = math.sqrt(spec.attention_scale * math.sqrt(spec.head_width))
    slope = 0.1 * math.log(spec.rope.factor)
    # Rounded to what somebody may have written.
    every, first = (round((x - 1) / slope, 9) for x in (raised, raised * spec.rope.magnitude))
    found.pop("attention_factor", None)
    return found | {"mscale": first, "mscale_all_dim": every}


def _pairs(width: int) -> np.ndarray:
    """Places of first halves, then of second halves, in an interleaved file."""
    return np.arange(width).reshape(-1, 2).T.reshape(-1)


def _query_order(spec: DecoderSpec) -> np.ndarray:
    """Each head's query has a part without positions, then the part that is turned."""
    assert spec.mla is not None
    head = np.concatenate([np.arange(spec.mla.nope_width), spec.mla.nope_width + _pairs(spec.mla.rope_width)])
    return (np.arange(spec.heads)[:, None] * spec.head_width + head[None, :]).reshape(-1)


def _key_order(spec: DecoderSpec) -> np.ndarray:
    """The latent, then the one key that is turned."""
    assert spec.mla is not None
    return np.concatenate([np.arange(spec.mla.kv_rank), spec.mla.kv_rank + _pairs(spec.mla.rope_width)])


def _later_tokens(config: HFConfig) -> tuple[str, ...]:
    """The blocks behind the last one predict the tokens after the next one, for drafts; they are not read."""
    layers = config.integer("num_hidden_layers")
    return tuple(f"model.layers.{layers + n}." for n in range(config.get("num_nextn_predict_layers", 0)))


_LATENT: Rules = {
    "q": (Rule(LAYER + "self_attn.q_proj.weight", order=_query_order),),
    "q_b": (Rule(LAYER + "self_attn.q_b_proj.weight", order=_query_order),),
    "kv_a": (Rule(LAYER + "self_attn.kv_a_proj_with_mqa.weight", order=_key_order),),
}
_OTHER = {
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "choice_bias": "mlp.gate.e_score_correction_bias",
} | {f"shared_{n}": f"mlp.shared_experts.{n}_proj.weight" for n in ("gate", "up", "down")}
FAMILY = Family(
    "deepseek_v3",
    spec_from,
    config_from,
    {**TOP, **ATTENTION, **MLP, **EXPERTS, **named(LAYER, _OTHER), **_LATENT},
    also_unread=_later_tokens,
    exact=frozenset({"choice_bias"}),
)
