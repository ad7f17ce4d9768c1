"""Peak temporary memory of the token statistics, forward and backward, compiled for an H200 on any machine.

    pip install --no-deps jax-cuda13-plugin==X jax-cuda13-pjrt==X      # X: the version of jax; no GPU is needed
    python benchmarks/token_stats_memory.py [--tokens 8192] [--width 2048] [--vocabulary 151936]

8192 tokens of a bfloat16 model with a vocabulary of 151,936, with and without a reference policy. What a compiled
program needs is known before it runs; nothing runs here. Results go to benchmarks/results/token_stats/memory_h200.json.
Without these wheels it compiles for the CPU, which has no bfloat16 products and needs more, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from ppojax.kernels import reference, tiled
from ppojax.kernels.pallas_gpu import SWEEPS
from ppojax.kernels.sweeps import XLA, Ask, Sweeps

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "token_stats" / "memory_h200.json"
IMPLEMENTATIONS: dict[str, Sweeps | None] = {"reference": None, "tiled": XLA, "pallas_gpu": SWEEPS}


def device() -> tuple[str, Any]:
    """An H200 that need not exist, or else this machine's CPU."""
    target = "".join(x for x in (HERE / "h200.textproto").open() if not x.startswith("#"))
    try:
        topology = topologies.get_topology_desc("h200", "cuda", target_config=target, topology="1x1x1")
    except (NotImplementedError, RuntimeError) as fault:
        print(f"compiling for the CPU: {fault}")
        return "cpu", jax.devices()[0]
    return "h200", topology.devices[0]


def compiled(sweeps: Sweeps | None, shape: tuple[int, int, int], ask: Ask, place: Any) -> Any:
    """The program of every statistic in `ask` and of its gradients; `sweeps` is None for the definition."""
    tokens, width, vocabulary = shape

    def objective(hidden: jax.Array, head: jax.Array, target: jax.Array, *other: Any) -> jax.Array:
        settings = {"temperature": 1.0, "softcap": None}
        if sweeps is None:
            stats = reference.token_stats(
                hidden, head, target, (other[0], other[1]) if other else None, **settings, **ask._asdict()
            )
        else:
            inputs = tiled.Inputs(hidden, head, target, *other)
            stats = tiled.token_stats(inputs, ask=ask, sweeps=sweeps, **settings)
        return sum((x.sum() for x in stats if x is not None), jnp.float32(0))

    where = jax.sharding.SingleDeviceSharding(place)
    pair = [jax.ShapeDtypeStruct((n, width), jnp.bfloat16, sharding=where) for n in (tokens, vocabulary)]
    target = jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=where)
    arguments = (*pair, target, *(pair if ask.reference else ()))
    return jax.jit(jax.value_and_grad(objective, (0, 1))).lower(*arguments).compile()


def main() -> None:
    """Compile each implementation, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 8192), ("width", 2048), ("vocabulary", 151_936)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    shape = (options.tokens, options.width, options.vocabulary)
    kind, place = device()
    asks = {"logp, entropy": Ask(entropy=True), "and KL, TV to a reference": Ask(entropy=True, kl=True, tv=True)}
    rows = []
    for asked, ask in asks.items():
        for name, sweeps in IMPLEMENTATIONS.items():
            start = time.perf_counter()
            memory = compiled(sweeps, shape, ask, place).memory_analysis()
            gib = memory.temp_size_in_bytes / 2**30
            rows.append({"asked": asked, "implementation": name, "temp_gib": round(gib, 3)})
            print(f"{kind}  {asked:28s}{name:12s}{gib:8.2f} GiB  ({time.perf_counter() - start:.1f} s)", flush=True)
    found = {"target": kind, "shape_TDV": shape, "dtype": "bfloat16", "jax": jax.__version__, "rows": rows}
    if kind == "h200":
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(found | {"date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
