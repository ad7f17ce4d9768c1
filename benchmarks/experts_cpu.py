"""Ways to multiply tokens with their experts: `ragged_dot`, a loop over blocks, and every expert on every token.

    uv run python benchmarks/experts_cpu.py [--cores 1]

Milliseconds of the forward pass and of forward and backward, best of 5, in float32. Results go to
benchmarks/results/experts_<platform>_<cores>core.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ppojax.models.experts import apply_experts

ROOT = Path(__file__).resolve().parent.parent
SHAPES = (  # tokens, width, experts, chosen, hidden width of one
    (32, 64, 8, 2, 64),
    (256, 64, 8, 2, 64),
    (32, 256, 16, 4, 256),
    (512, 256, 16, 4, 256),
    (2048, 512, 32, 4, 384),
)


def every_expert(x: jax.Array, expert: jax.Array, weight: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    """All experts on all tokens, weighed by zero where they were not chosen."""
    N = x.shape[0]
    weight_NE = jnp.zeros((N, w["expert_gate"].shape[0])).at[jnp.arange(N)[:, None], expert].add(weight)
    h = jax.nn.silu(jnp.einsum("nd,edf->enf", x, w["expert_gate"])) * jnp.einsum("nd,edf->enf", x, w["expert_up"])
    return jnp.einsum("enf,efd->nd", h * weight_NE.T[:, :, None], w["expert_down"])


def best(f: Callable[..., Any], *arguments: Any) -> float:
    """Shortest of five calls, in milliseconds."""
    jax.block_until_ready(f(*arguments))
    shortest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        shortest = min(shortest, time.perf_counter() - start)
    return shortest * 1e3


def measure(N: int, D: int, E: int, K: int, F: int) -> dict[str, list[float]]:
    """Forward, and forward with backward, of each way."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"expert_gate": (E, D, F), "expert_up": (E, D, F), "expert_down": (E, F, D)}
    w = {name: 0.05 * jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=False)}
    x = jax.random.normal(keys[3], (N, D))
    weight, expert = jax.lax.top_k(jax.nn.softmax(jax.random.normal(keys[4], (N, E))), K)
    ways: dict[str, Callable[..., jax.Array]] = {
        "dense": lambda x, w: every_expert(x, expert, weight, w),
        "ragged": lambda x, w: apply_experts(x, expert, weight, w, "silu", "ragged"),
        "blocks": lambda x, w: apply_experts(x, expert, weight, w, "silu", "blocks"),
    }
    out = {}
    for name, way in ways.items():
        backward = jax.jit(jax.grad(lambda x, w, way=way: jnp.sum(jnp.sin(way(x, w))), (0, 1)))
        out[name] = [round(best(f, x, w), 3) for f in (jax.jit(way), backward)]
    return out


def processor() -> str:
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Measure every shape and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=1)
    cores = parser.parse_args().cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    results: dict[str, Any] = {
        "machine": {"platform": jax.default_backend(), "cpu": processor(), "cores": cores},
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
        "milliseconds [forward, forward and backward]": {},
    }
    for shape in SHAPES:
        figures = measure(*shape)
        name = "N={} D={} E={} K={} F={}".format(*shape)
        results["milliseconds [forward, forward and backward]"][name] = figures
        ratios = {way: round(t[1] / figures["blocks"][1], 1) for way, t in figures.items()}
        print(f"{name}: {figures}, times blocks {ratios}", flush=True)
    out = ROOT / "benchmarks" / "results" / f"experts_{jax.default_backend()}_{cores}core.json"
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
