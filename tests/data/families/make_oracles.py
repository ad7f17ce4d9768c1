"""Write the folders beside this file: tiny random checkpoints as transformers saves them, and what it computes.

    python -m venv /tmp/oracle
    /tmp/oracle/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/oracle/bin/python tests/data/families/make_oracles.py [CASE ...]

A folder holds `config.json`, `model.safetensors` and `oracle.npz`, all in float32 on the CPU with eager attention:

    token            int32 [2, T]: two rows that share their first PREFIX tokens
    logits           float32 [2, T, V]
    length           int32 [2]: how much of each row is real in the padded batches
    left_logits      float32 [sum of length, V]: the real tokens of the rows padded on the left
    right_logits     the same, padded on the right
    grad:NAME        some families: gradient of the next tokens' mean cross-entropy by the tensor NAME of the file
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
LENGTH, PREFIX, REAL = 22, 7, (22, 13)
SMALL = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GRADIENTS = ("embed_tokens", "lm_head", "layers.1.", "model.norm")


def shape(width: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (width, ffn, layers, heads, kv_heads), strict=True))


# name: (model_type, type in the file, gradients wanted, config)
CASES: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "llama_tied": (
        *("llama", "float32", True),
        shape(24, 40, 2, 3, 1)
        | {"head_dim": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1e4}},
    ),
    "llama_rope3": (
        *("llama", "bfloat16", True),
        shape(30, 44, 3, 5, 5) | {"head_dim": 12, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
    ),
    "llama_bias": (
        *("llama", "float32", True),
        shape(24, 32, 2, 6, 3)
        | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "smollm3": (
        *("smollm3", "float32", False),
        shape(24, 32, 4, 3, 1)
        | {"no_rope_layer_interval": 2, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e4}},
    ),
    "smollm3_untied": (
        *("smollm3", "bfloat16", False),
        shape(32, 40, 3, 4, 2)
        | {"no_rope_layers": [0, 1, 0], "tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 5}
        | {"rope_parameters": {"rope_theta": 5e4}},
    ),
    "qwen2_tied": (
        *("qwen2", "bfloat16", False),
        shape(28, 40, 2, 7, 1) | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
    ),
    "qwen2_window": (
        *("qwen2", "float32", False),
        shape(24, 32, 3, 3, 3)
        | {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": {"rope_theta": 1e4},
        },
    ),
    "qwen3_tied": (
        *("qwen3", "float32", True),
        shape(24, 40, 2, 5, 1) | {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
    ),
    "qwen3_yarn": (
        *("qwen3", "bfloat16", False),
        shape(32, 40, 3, 6, 2)
        | {"head_dim": 16, "attention_bias": True, "max_position_embeddings": 32}
        | {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
            | {"original_max_position_embeddings": 8}
        },
    ),
    "qwen3_moe": (
        *("qwen3_moe", "bfloat16", False),
        shape(24, 32, 3, 3, 1)
        | {
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 10,
            "norm_topk_prob": True,
        }
        | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e4}},
    ),
    "qwen3_moe_dense": (
        *("qwen3_moe", "float32", True),
        shape(20, 28, 3, 4, 2)
        | {
            "head_dim": 6,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "norm_topk_prob": False,
        }
        | {"mlp_only_layers": [0], "rope_parameters": {"rope_theta": 1e4}},
    ),
    "gemma3": (
        *("gemma3_text", "float32", True),
        shape(24, 32, 3, 3, 1)
        | {"head_dim": 8, "query_pre_attn_scalar": 7, "sliding_window": 5, "tie_word_embeddings": True}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "gemma3_capped": (
        *("gemma3_text", "bfloat16", False),
        shape(32, 36, 4, 4, 2)
        | {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 4, "tie_word_embeddings": False}
        | {"final_logit_softcapping": 3.0}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gpt_oss": (
        *("gpt_oss", "bfloat16", True),
        shape(24, 12, 2, 6, 2)
        | {"head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 5}
        | {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1.5e5, "factor": 8.0, "truncate": False}
            | {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 8}
        },
    ),
    "gpt_oss_tied": (
        *("gpt_oss", "float32", False),
        shape(20, 10, 3, 3, 1)
        | {
            "head_dim": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "sliding_window": 4,
            "tie_word_embeddings": True,
        }
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "deepseek_v3": (
        *("deepseek_v3", "bfloat16", True),
        shape(24, 32, 3, 3, 3)
        | {"q_lora_rank": 14, "kv_lora_rank": 10, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 7}
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
        | {"moe_intermediate_size": 6, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "num_mtp_layers": 0}
        | {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 1.0}
            | {"mscale_all_dim": 0.7, "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1}
        },
    ),
    "deepseek_v3_full_q": (
        *("deepseek_v3", "float32", False),
        shape(20, 24, 3, 2, 2)
        | {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}
        | {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
        | {"moe_intermediate_size": 6, "first_k_dense_replace": 2, "routed_scaling_factor": 1.0, "num_mtp_layers": 0}
        | {"norm_topk_prob": False, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e4}},
    ),
}


def draw(name: str, shape: torch.Size, model_type: str, generator: torch.Generator) -> torch.Tensor:
    """Values under which every part matters and logits are about 1."""
    transposed = model_type == "gpt_oss"
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 0.3 * noise + (0.0 if model_type == "gemma3_text" else 1.0)
    if name.endswith("sinks"):
        return noise
    if "bias" in name:
        return 0.3 * noise
    if "embed_tokens" in name or "lm_head" in name:
        return 1.5 * noise / math.sqrt(shape[-1])
    # Stacked experts of gpt_oss are [E, in, out], those of the others [E, out, in]; matrices are [out, in].
    fan_in = shape[-2] if len(shape) == 3 and transposed else shape[-1]
    # Some of gpt_oss's gates have to reach their bound of 7.
    return (3.0 if transposed and "gate_up" in name else 1.2) * noise / math.sqrt(fan_in)


def make(case: str, seed: int) -> dict[str, Any]:
    model_type, dtype, gradients, settings = CASES[case]
    folder = HERE / case
    shutil.rmtree(folder, ignore_errors=True)
    config = AutoConfig.for_model(model_type, **(SMALL | settings))
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name and "embed_scale" not in name:
                value.copy_(draw(name, value.shape, model_type, generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()

    token = torch.randint(3, config.vocab_size, (2, LENGTH), generator=generator)
    token[1, :PREFIX] = token[0, :PREFIX]
    with torch.no_grad():
        logits = model(token).logits
        arrays = {"token": token.int(), "logits": logits, "length": torch.tensor(REAL, dtype=torch.int32)}
        for side in ("left", "right"):
            arrays[f"{side}_logits"] = padded_logits(model, token, side)
    spread = [(arrays[f"{s}_logits"] - packed(logits)).abs().max().item() for s in ("left", "right")]
    if gradients:
        arrays |= gradients_of(model, token, folder)
    np.savez_compressed(folder / "oracle.npz", **{name: value.numpy() for name, value in arrays.items()})
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{case:20} {size / 1024:6.0f} KB, logits std {logits.std():.2f}, padding moves them by {max(spread):.1e}")
    return {"model_type": model_type, "dtype": dtype, "gradients": gradients, "seed": seed}


def packed(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:n] for row, n in zip(logits, REAL, strict=True)])


def padded_logits(model: torch.nn.Module, token: torch.Tensor, side: str) -> torch.Tensor:
    """Logits of the real tokens where the rows are cut to their lengths and filled up on one side."""
    places = [range(LENGTH - n, LENGTH) if side == "left" else range(n) for n in REAL]
    mask = torch.zeros(token.shape, dtype=torch.long)
    ids = torch.zeros_like(token)
    for row, place in enumerate(places):
        mask[row, list(place)] = 1
        ids[row, list(place)] = token[row, : REAL[row]]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    return torch.cat([logits[row, list(place)] for row, place in enumerate(places)])


def gradients_of(model: torch.nn.Module, token: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())  # experts that the file holds one by one are stacked in the model
    logits = model(token).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, token[:, 1:].flatten()).backward()
    return {
        f"grad:{name}": value.grad
        for name, value in model.named_parameters()
        if name in names and value.grad is not None and any(part in name for part in GRADIENTS)
    }


def main(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    done = {case: make(case, seed) for seed, case in enumerate(CASES) if not chosen or case in chosen}
    if not chosen:
        record = {"torch": torch.__version__, "transformers": transformers.__version__, "prefix": PREFIX, "cases": done}
        (HERE / "cases.json").write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1:])
