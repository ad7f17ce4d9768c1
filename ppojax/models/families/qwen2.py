"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from ppojax.models.families.config import HFConfig, common_config, layer_types
from ppojax.models.families.family import Family
from ppojax.models.families.layout import ATTENTION, MLP, TOP
from ppojax.models.spec import DecoderSpec


def windows(config: HFConfig, layers: int, first: int) -> dict[str, Any]:
    """Sliding windows of the Qwen families: from block `max_window_layers` (or `first`) on, and only if asked for."""
    if not config.get("use_sliding_window", False) or config.get("sliding_window", 4096) is None:
        return {}
    first = config.get("max_window_layers", first)
    return config.windows([n >= first for n in range(layers)], config.get("sliding_window", 4096))


def windows_config(spec: DecoderSpec) -> dict[str, Any]:
    """Write sliding windows; transformers 4 reads only `max_window_layers`, so they are from some block on there."""
    windowed = spec.windowed or (False,) * spec.layers
    return {
        "use_sliding_window": any(windowed),
        "sliding_window": spec.window,
        "max_window_layers": windowed.index(True) if any(windowed) else spec.layers,
        "layer_types": layer_types(spec),
    }


def spec_from(config: HFConfig) -> DecoderSpec:
    """Read the config."""
    config.expect({"hidden_act": "silu"})
    sizes = config.sizes()
    return DecoderSpec(
        **sizes,
        **config.heads(),
        rope=config.rope(10_000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=True,
        **windows(config, sizes["layers"], 28),
    )


def config_from(spec: DecoderSpec) -> dict[str, Any]:
    """Write the config."""
    return common_config("qwen2", "Qwen2ForCausalLM", spec) | windows_config(spec)


FAMILY = Family("qwen2", spec_from, config_from, {**TOP, **ATTENTION, **MLP})
