"""Compile time of a 28-layer model against a 4-layer one: blocks are scanned, so it should hardly grow with depth.

    uv run python benchmarks/compile_depth.py [--repeats 5]

What is compiled is the forward and backward pass of `score_tokens` over 8 rows of 256 tokens, with a shared prompt, for
the shapes of a 0.6B Qwen3 and of a Gemma-like model (blocks with and without a window, norms behind attention and MLP).
Nothing is run, so the weights are never made. Depths take turns; figures are medians of tracing, lowering and compiling
without any cache. Results go to benchmarks/results/compile_depth_<cores>core.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from step_cpu import machine

from ppojax.models.forward import ModelDef, Params, abstract_params, score_tokens
from ppojax.models.spec import DecoderSpec, RopeSpec
from ppojax.types import Experience, Layout

DEPTHS = (4, 28)
AIM = 1.3
ROWS, LENGTH, PREFIX, ACTIONS = 8, 256, 64, 128
QWEN3 = DecoderSpec(
    layers=28, width=1024, heads=16, kv_heads=8, head_width=128, ffn=3072, vocab=151_936, rope=RopeSpec(theta=1e6),
    norm_eps=1e-6, qk_norm=True,
)  # fmt: skip
GEMMA = QWEN3.model_copy(
    update={
        "activation": "gelu_tanh", "norm_offset": True, "sandwich": True, "embed_scale": 32.0, "window": 128,
        "local_rope": RopeSpec(theta=1e4), "logit_softcap": 30.0,
    }
)  # fmt: skip


def at_depth(spec: DecoderSpec, layers: int) -> DecoderSpec:
    """The same model with another number of blocks; with a window, every fourth block goes without."""
    windowed = tuple(n % 4 != 3 for n in range(layers)) if spec.window else ()
    return spec.model_copy(update={"layers": layers, "windowed": windowed})


def rows() -> Experience:
    """Shapes and types of a batch."""

    def leaf(*shape: int, dtype: str = "int32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    per_token, per_row = (ROWS, LENGTH), (ROWS,)
    return Experience(
        token_BT=leaf(*per_token),
        length_B=leaf(*per_row),
        prefix_B=leaf(*per_row),
        action_BT=leaf(*per_token, dtype="bool"),
        action_index_BA=leaf(ROWS, ACTIONS),
        logp_behavior_BT=leaf(*per_token, dtype="float32"),
        reward_BT=leaf(*per_token, dtype="float32"),
        ending_B=leaf(*per_row),
        valid_B=leaf(*per_row, dtype="bool"),
        group_B=leaf(*per_row),
        episode_B=leaf(*per_row),
        segment_B=leaf(*per_row),
    )


def compile_seconds(spec: DecoderSpec) -> float:
    """Trace, lower and compile one gradient, from nothing."""
    model = ModelDef(spec)

    def loss(params: Params, experience: Experience) -> jax.Array:
        stats = score_tokens(model, params, experience, Layout(group=ROWS, prefix=PREFIX), temperature=1.0)
        return jnp.sum(stats.logp)

    params, experience = abstract_params(model), rows()
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(jax.value_and_grad(loss)).lower(params, experience).compile()
    return time.perf_counter() - start


def measure(spec: DecoderSpec, repeats: int) -> dict[str, Any]:
    """Compile both depths in turn, once unmeasured."""
    seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for n in range(repeats + 1):
        for depth in DEPTHS:
            taken = compile_seconds(at_depth(spec, depth))
            if n:
                seconds[depth].append(taken)
    shallow, deep = (statistics.median(seconds[depth]) for depth in DEPTHS)
    return {
        "seconds": {str(depth): s for depth, s in seconds.items()},
        "median": [shallow, deep],
        "ratio": deep / shallow,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured compilations of each depth")
    repeats = parser.parse_args().repeats
    jax.config.update("jax_enable_compilation_cache", False)
    found = {name: measure(spec, repeats) for name, spec in (("qwen3-0.6b", QWEN3), ("gemma-like", GEMMA))}
    cores = len(os.sched_getaffinity(0))
    for name, figures in found.items():
        shallow, deep = figures["median"]
        print(
            f"{name}: {DEPTHS[0]} layers {shallow:.2f} s, {DEPTHS[1]} layers {deep:.2f} s: {figures['ratio']:.2f} times"
        )
    out = Path(__file__).parent / "results" / f"compile_depth_{cores}core.json"
    shapes = {"rows": ROWS, "length": LENGTH, "prefix": PREFIX, "actions": ACTIONS, "depths": DEPTHS, "aim": AIM}
    record = {"machine": machine(cores), "jax": jax.__version__, "shapes": shapes, "models": found}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
