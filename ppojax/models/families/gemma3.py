"""Gemma 3, text (arXiv 2503.19786): windows in five of six blocks, norms on both sides, large scaled embeddings."""

from __future__ import annotations

import math
from typing import Any

from ppojax.models.families.config import HFConfig, common_config, layer_types, rope_parameters
from ppojax.models.families.family import Family
from ppojax.models.families.layout import ATTENTION, LAYER, MLP, TOP, named
from ppojax.models.spec import DecoderSpec, RopeSpec


def _ropes(config: HFConfig) -> tuple[RopeSpec, RopeSpec]:
    """Rotary positions of blocks without and with a window; transformers 5 nests them by the type of the block."""
    nested = config.get("rope_parameters", {})
    full = dict(nested.get("full_attention") or {}) | config.get("rope_scaling", {})
    local = dict(nested.get("sliding_attention") or {})
    local.setdefault("rope_theta", config.get("rope_local_base_freq", 10_000.0))
    return config.rope(1_000_000.0, full), config.rope(10_000.0, local)


def spec_from(config: HFConfig) -> DecoderSpec:
    """Read the config."""
    config.expect({"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False})
    config.expect({"attn_logit_softcapping": None})  # transformers reads it and does not apply it
    layers, width = config.integer("num_hidden_layers"), config.integer("hidden_size")
    bias = config.get("attention_bias", False)
    pattern = config.integer("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    rope, local = _ropes(config)
    windows = config.windows([(n + 1) % pattern != 0 for n in range(layers)], config.integer("sliding_window", 4096))
    return DecoderSpec(
        layers=layers,
        width=width,
        heads=config.integer("num_attention_heads", 8),
        kv_heads=config.integer("num_key_value_heads", 4),
        head_width=config.integer("head_dim", 256),
        ffn=config.integer("intermediate_size"),
        vocab=config.integer("vocab_size", 262_208),
        rope=rope,
        local_rope=local if windows else None,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", True),
        activation="gelu_tanh",
        norm_offset=True,
        sandwich=True,
        embed_scale=math.sqrt(width),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=config.get("final_logit_softcapping"),
        **windows,
    )


def config_from(spec: DecoderSpec) -> dict[str, Any]:
    """Write the config."""
    local = spec.local_rope or RopeSpec()
    scalar = (spec.attention_scale or spec.head_width**-0.5) ** -2
    return common_config("gemma3_text", "Gemma3ForCausalLM", spec) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": spec.qkv_bias,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": spec.logit_softcap,
        "sliding_window": spec.window or 4096,
        "layer_types": layer_types(spec),
        "rope_local_base_freq": local.theta,
        "rope_parameters": {
            "full_attention": rope_parameters(spec.rope),
            "sliding_attention": rope_parameters(local),
        },
    }


NORMS = {
    "attn_norm": "input_layernorm.weight",
    "post_attn_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}
FAMILY = Family("gemma3_text", spec_from, config_from, {**TOP, **ATTENTION, **MLP, **named(LAYER, NORMS)})
