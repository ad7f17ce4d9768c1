"""gpt-oss (arXiv 2508.10925): experts with biases and a clipped SwiGLU, attention sinks, windows."""

from __future__ import annotations

from typing import Any

from ppojax.models.families.config import HFConfig, common_config, layer_types, rope_parameters
from ppojax.models.families.family import Family
from ppojax.models.families.layout import ATTENTION, LAYER, TOP, Rule, Rules, named
from ppojax.models.spec import DecoderSpec, MoESpec

_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def spec_from(config: HFConfig) -> DecoderSpec:
    """Read the config."""
    config.expect({"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0})
    sizes, bias = config.sizes(), config.get("attention_bias", True)
    return DecoderSpec(
        **sizes,
        **config.heads(64),
        rope=config.rope(150_000.0, None if config.rope_settings() else _DEFAULT_ROPE),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        tied=config.get("tie_word_embeddings", False),
        activation="clipped_swiglu",
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        moe=MoESpec(
            experts=config.integer("num_local_experts", config.get("num_experts", 128)),
            chosen=config.integer("num_experts_per_tok", config.get("experts_per_token", 4)),
            ffn=sizes["ffn"],
            scoring="softmax_chosen",
            router_bias=True,
            expert_bias=True,
        ),
        **config.windows([n % 2 == 0 for n in range(sizes["layers"])], config.integer("sliding_window", 128)),
    )


def config_from(spec: DecoderSpec) -> dict[str, Any]:
    """Write the config."""
    moe = spec.moe or MoESpec(experts=1, chosen=1, ffn=1)
    return common_config("gpt_oss", "GptOssForCausalLM", spec) | {
        "attention_bias": spec.qkv_bias,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.chosen,
        "intermediate_size": moe.ffn,
        "sliding_window": spec.window or 128,
        "layer_types": layer_types(spec),
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        # Without it transformers 4 would stretch positions by its own default.
        "rope_scaling": {k: v for k, v in rope_parameters(spec.rope).items() if k != "rope_theta"},
    }


_EXPERTS: Rules = {
    "expert_gate": (Rule(LAYER + "mlp.experts.gate_up_proj", transposed=False, part=(0, 2, True)),),
    "expert_up": (Rule(LAYER + "mlp.experts.gate_up_proj", transposed=False, part=(1, 2, True)),),
    "expert_down": (Rule(LAYER + "mlp.experts.down_proj", transposed=False),),
    "expert_gate_bias": (Rule(LAYER + "mlp.experts.gate_up_proj_bias", transposed=False, part=(0, 2, True)),),
    "expert_up_bias": (Rule(LAYER + "mlp.experts.gate_up_proj_bias", transposed=False, part=(1, 2, True)),),
    "expert_down_bias": (Rule(LAYER + "mlp.experts.down_proj_bias", transposed=False),),
}
_OTHER = {"sinks": "self_attn.sinks", "router": "mlp.router.weight", "router_bias": "mlp.router.bias"}
FAMILY = Family("gpt_oss", spec_from, config_from, {**TOP, **ATTENTION, **named(LAYER, _OTHER), **_EXPERTS})
