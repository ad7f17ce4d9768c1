"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and SmolLM2, which has its shape."""

from __future__ import annotations

from typing import Any

from ppojax.models.families.config import HFConfig, common_config
from ppojax.models.families.family import Family
from ppojax.models.families.layout import ATTENTION, MLP, TOP
from ppojax.models.spec import DecoderSpec


def spec_from(config: HFConfig) -> DecoderSpec:
    """Read the config; `attention_bias` means all four projections."""
    config.expect({"hidden_act": "silu"})
    bias = config.get("attention_bias", False)
    return DecoderSpec(
        **config.sizes(),
        **config.heads(),
        rope=config.rope(10_000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.get("mlp_bias", False),
    )


def config_from(spec: DecoderSpec) -> dict[str, Any]:
    """Write the config."""
    biases = {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    return common_config("llama", "LlamaForCausalLM", spec) | biases


FAMILY = Family("llama", spec_from, config_from, {**TOP, **ATTENTION, **MLP})
