"""DPPO's trust region over the binary, the top-K and the full support: what each learns, and what a step takes.

    uv run python benchmarks/support_cpu.py [--cores 2]          configs/tiny.yaml, 8 steps, two seeds, by the command
    uv run --extra smollm2 python benchmarks/support_cpu.py --times      seconds a step, of it and of SmolLM2-135M
    uv run --extra smollm2 python benchmarks/support_cpu.py --smollm2    three steps of it with everything exact

With seed 1, and with --smollm2, all three supports are measured on every token, whichever of them decides; it is
counted where a coarser one shows more than a finer one. Times are of three trainers that take turns in one process, and
their ratios the medians over the turns. Results go to benchmarks/results/support/.
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
SUPPORTS = ("binary", "topk", "full")
SECONDS = {"step": "timing_s/step", "sampling": "timing_s/gen", "actor": "timing_s/update_actor"}
KEPT = (
    "reward/mean",
    "trust_region/tv_mean",
    "trust_region/tv_max",
    "trust_region/kl_mean",
    "trust_region/masked_frac",
    "trust_region/order_violation_frac",
    "trust_region/order_excess_max",
    "sampling/tv_mean",
    "sampling/tv_max",
    "sampling/kl_mean",
    "sampling/logp_diff_max",
    "actor/kl_loss",
    "actor/entropy",
)
EXACT = (
    "loss.support=full",
    "loss.compare_supports=true",
    "loss.kl.coefficient=0.01",
    "loss.kl.estimator=full",
    "loss.entropy_coefficient=0.001",
    "steps=3",
    "eval.every=0",
)
SHAPES = {
    "tiny": ("configs/tiny.yaml", "warm_start=null"),
    "quickstart": ("configs/quickstart.yaml", "critic.warmup_steps=0"),
}


def run(config: str, cores: int, *arguments: str) -> list[dict[str, Any]]:
    """Train by the command on the first `cores` processors; the rows of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ppojax.train", f"config={ROOT / config}", f"run.dir={folder}", "run.name=run"]
        subprocess.run(
            [*command, "run.tensorboard=false", "checkpoint.every=0", *arguments],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "reward/mean" in row]
    return [{name: row[name] for name in KEPT if name in row} for row in rows]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run came to."""
    out: dict[str, Any] = {
        "reward_first": rows[0]["reward/mean"],
        "reward_last_3": statistics.mean(row["reward/mean"] for row in rows[-3:]),
        "tv_max": max(row["trust_region/tv_max"] for row in rows),
    }
    for name in ("trust_region/order_violation_frac", "trust_region/order_excess_max", "sampling/tv_max"):
        if name in rows[0]:
            out[name] = max(row[name] for row in rows)
    return out


def learning(cores: int) -> dict[str, Any]:
    """Train with every support and two seeds."""
    runs = []
    for plan in (("seed=0",), ("seed=1", "loss.compare_supports=true")):
        for support in SUPPORTS:
            rows = run("configs/tiny.yaml", cores, f"loss.support={support}", *plan)
            runs.append({"support": support, "arguments": plan, "summary": summary(rows), "steps": rows})
            print(support, *plan, json.dumps(runs[-1]["summary"]), flush=True)
    return {"config": "configs/tiny.yaml", "runs": runs}


def exact(cores: int) -> dict[str, Any]:
    """Three steps of SmolLM2-135M over all of its 49,152 tokens."""
    rows = run("configs/quickstart.yaml", cores, *EXACT)
    print(json.dumps(rows[-1]))
    return {"config": "configs/quickstart.yaml", "arguments": EXACT, "summary": summary(rows), "steps": rows}


def times(turns: int) -> dict[str, Any]:
    """Seconds of the parts of a step with every support, and over those with the binary one."""
    from ppojax.config import Config
    from ppojax.trainer import Trainer

    found = {}
    for shape, (config, change) in SHAPES.items():
        trainers = {
            support: Trainer(Config.load(f"config={ROOT / config}", change, f"loss.support={support}"))
            for support in SUPPORTS
        }
        for trainer in trainers.values():
            trainer.step()  # compiles
        steps: dict[str, list[Any]] = {support: [] for support in SUPPORTS}
        for _ in range(turns):
            for support, trainer in trainers.items():
                metrics = trainer.step().metrics
                steps[support].append({part: metrics[key] for part, key in SECONDS.items()})
        found[shape] = {
            support: {
                part: {
                    "seconds": statistics.median(step[part] for step in rows),
                    "times_binary": statistics.median(
                        step[part] / other[part] for step, other in zip(rows, steps["binary"], strict=True)
                    ),
                }
                for part in SECONDS
            }
            | {"turns": rows}
            for support, rows in steps.items()
        }
        for support in SUPPORTS:
            print(shape, support, json.dumps({part: found[shape][support][part] for part in SECONDS}), flush=True)
    return {"shapes": found}


def machine(cores: int) -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": cores, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    """Run what is asked for and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--times", action="store_true")
    mode.add_argument("--smollm2", action="store_true")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.times:
        name, results = "times", times(options.turns)
    elif options.smollm2:
        name, results = "smollm2", exact(options.cores)
    else:
        name, results = "tiny", learning(options.cores)
    out = ROOT / "benchmarks" / "results" / "support" / f"{name}_{options.cores}core.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(options.cores), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
