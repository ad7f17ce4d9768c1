"""Qwen3 with experts (arXiv 2505.09388): softmax over all experts, then the best few."""

from __future__ import annotations

from typing import Any

from ppojax.errors import DataError
from ppojax.models.families.config import HFConfig, common_config
from ppojax.models.families.family import Family
from ppojax.models.families.layout import ATTENTION, EXPERTS, MLP, TOP
from ppojax.models.spec import DecoderSpec, MoESpec


def spec_from(config: HFConfig) -> DecoderSpec:
    """Read the config; blocks with a dense MLP must be the first ones."""
    config.expect({"hidden_act": "silu", "decoder_sparse_step": 1})
    sizes, bias = config.sizes(), config.get("attention_bias", False)
    dense = sorted(config.get("mlp_only_layers", []))
    if dense != list(range(len(dense))):
        raise DataError(
            f"{config.where}: mlp_only_layers = {dense!r:.60}, expected the first blocks of the model; use another one"
        )
    windows: dict[str, Any] = {}
    if config.get("use_sliding_window", False):
        windows = config.windows([True] * sizes["layers"])
    return DecoderSpec(
        **sizes,
        **config.heads(),
        rope=config.rope(10_000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        moe=MoESpec(
            experts=config.integer("num_experts", config.get("num_local_experts", 128)),
            chosen=config.integer("num_experts_per_tok", 8),
            ffn=config.integer("moe_intermediate_size", 768),
            dense_first=len(dense),
            normalise=config.get("norm_topk_prob", False),
        ),
        **windows,
    )


def config_from(spec: DecoderSpec) -> dict[str, Any]:
    """Write the config."""
    moe = spec.moe or MoESpec(experts=1, chosen=1, ffn=1)
    return common_config("qwen3_moe", "Qwen3MoeForCausalLM", spec) | {
        "attention_bias": spec.qkv_bias,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.chosen,
        "moe_intermediate_size": moe.ffn,
        "mlp_only_layers": list(range(moe.dense_first)),
        "decoder_sparse_step": 1,
        "norm_topk_prob": moe.normalise,
        "use_sliding_window": spec.window is not None,
        "sliding_window": spec.window,
    }


FAMILY = Family("qwen3_moe", spec_from, config_from, {**TOP, **ATTENTION, **MLP, **EXPERTS})
