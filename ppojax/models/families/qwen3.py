"""Qwen3, dense (arXiv 2505.09388): norms on each head's query and key."""

from __future__ import annotations

from typing import Any

from ppojax.models.families.config import HFConfig, common_config
from ppojax.models.families.family import Family
from ppojax.models.families.layout import ATTENTION, MLP, TOP
from ppojax.models.families.qwen2 import windows, windows_config
from ppojax.models.spec import DecoderSpec


def spec_from(config: HFConfig) -> DecoderSpec:
    """Read the config."""
    config.expect({"hidden_act": "silu"})
    sizes, bias = config.sizes(), config.get("attention_bias", False)
    return DecoderSpec(
        **sizes,
        **config.heads(128),
        rope=config.rope(10_000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        **windows(config, sizes["layers"], 28),
    )


def config_from(spec: DecoderSpec) -> dict[str, Any]:
    """Write the config."""
    config = common_config("qwen3", "Qwen3ForCausalLM", spec)
    return config | {"attention_bias": spec.qkv_bias} | windows_config(spec)


FAMILY = Family("qwen3", spec_from, config_from, {**TOP, **ATTENTION, **MLP})
