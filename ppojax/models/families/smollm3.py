"""SmolLM3: Llama with blocks that have no positions (NoPE, arXiv 2305.19466)."""

from __future__ import annotations

from typing import Any

from ppojax.models.families.config import HFConfig, common_config, layer_types
from ppojax.models.families.family import Family
from ppojax.models.families.layout import ATTENTION, MLP, TOP
from ppojax.models.spec import DecoderSpec


def spec_from(config: HFConfig) -> DecoderSpec:
    """Read the config; `no_rope_layers` has a 1 for blocks that do turn (sic)."""
    config.expect({"hidden_act": "silu"})
    sizes, bias = config.sizes(), config.get("attention_bias", False)
    interval = config.integer("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers", [(n + 1) % interval != 0 for n in range(sizes["layers"])])
    turned = turned[: sizes["layers"]]
    windows: dict[str, Any] = {}
    if config.get("use_sliding_window", False) and config.get("sliding_window") is not None:
        windows = config.windows([not t for t in turned])
    return DecoderSpec(
        **sizes,
        **config.heads(),
        rope=config.rope(2_000_000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.get("mlp_bias", False),
        unrotated=() if all(turned) else tuple(not t for t in turned),
        **windows,
    )


def config_from(spec: DecoderSpec) -> dict[str, Any]:
    """Write the config."""
    return common_config("smollm3", "SmolLM3ForCausalLM", spec) | {
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
        "no_rope_layers": [int(not u) for u in spec.unrotated or (False,) * spec.layers],
        "use_sliding_window": spec.window is not None,
        "sliding_window": spec.window,
        "layer_types": layer_types(spec),
    }


FAMILY = Family("smollm3", spec_from, config_from, {**TOP, **ATTENTION, **MLP})
