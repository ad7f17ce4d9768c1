"""What `rollout.mode=one_step_off` hides of an environment's time, and what older weights cost in learning.

    uv run python benchmarks/asynchrony.py [--naps 0 0.5 1 2] [--steps 6] [--seeds 0 1 2]

The model of configs/tiny.yaml (16 prompts x 8 episodes). Speed: each answer to a turn takes `nap` seconds, all episodes
at the same time; both modes in turn, twice, in one process, medians of the steps that begin after everything has been
compiled and the first episodes have been played. The prediction is made from the sync steps alone: with G seconds for
writing, W for waiting and U for the rest, on one core G + max(W, U) over G + W + U. Learning: configs/tiny.yaml as it
is, to its end. Results go to benchmarks/results/asynchrony/cpu.json, beside those of other naps and seeds there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import jax

from ppojax.config import Config
from ppojax.envs import Calculator, Env, Step
from ppojax.trainer import Trainer
from ppojax.trainer.build import EVALUATE, OUTSIDE, purpose_key
from ppojax.trainer.evaluation import evaluate_greedy

ROOT = Path(__file__).resolve().parent.parent
MODES = ("sync", "one_step_off")
TIMES = ("step", "cpu", "gen", "env_wait", "gen_wait", "values", "update_actor", "update_critic")


class SlowEnv:
    """An environment whose answers take a while."""

    def __init__(self, env: Env, nap_s: float) -> None:
        self.reset, self.close, self._step, self._nap = env.reset, env.close, env.step, partial(time.sleep, nap_s)

    def step(self, message: dict[str, Any]) -> Step:
        """Answer, later."""
        self._nap()
        return self._step(message)


class Slow(Calculator):
    """A calculator that takes its time."""

    nap_s: float

    def make(self) -> Env:
        """Make an environment for one episode."""
        return SlowEnv(super().make(), self.nap_s)


def timed(trainer: Trainer) -> dict[str, float]:
    """What a step logs, and the processor's seconds that passed during it, in all threads."""
    start = time.process_time()
    metrics = trainer.step().metrics
    return metrics | {"timing_s/cpu": time.process_time() - start}


def speed(nap_s: float, steps: int) -> dict[str, Any]:
    """Seconds of steps in both modes, and their ratio, predicted and measured."""
    plain = Config.load("config=configs/tiny.yaml", "warm_start=null", "rollout.workers=128", "steps=99")
    plain = plain.model_copy(update={"env": Slow(**plain.env.model_dump(), nap_s=nap_s)})
    trainers = {
        mode: Trainer(plain.model_copy(update={"rollout": plain.rollout.model_copy(update={"mode": mode})}))
        for mode in MODES
    }
    seen: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(2):
        for mode, trainer in trainers.items():
            seen[mode] += [timed(trainer) for _ in range(steps + 2)][2:]
            trainer.close()
    seconds = {
        mode: {t: statistics.median(m[f"timing_s/{t}"] for m in rows) for t in TIMES if f"timing_s/{t}" in rows[0]}
        for mode, rows in seen.items()
    }
    whole, gen, wait = (seconds["sync"][name] for name in ("step", "gen", "env_wait"))
    ratio = {
        "predicted": (gen - wait + max(wait, whole - gen)) / whole,
        "measured": seconds["one_step_off"]["step"] / whole,
    }
    print(f"nap {nap_s} s: {ratio}  {seconds}", flush=True)
    return {"steps": 2 * steps, "seconds": seconds, "ratio": ratio}


def learning(mode: str, seed: int) -> dict[str, Any]:
    """Rewards of the steps of configs/tiny.yaml, and greedy success before and after."""
    config = Config.load("config=configs/tiny.yaml", f"rollout.mode={mode}", f"seed={seed}")
    trainer = Trainer(config)
    trainer.warm_start()
    key = purpose_key(seed, OUTSIDE, EVALUATE)

    def success() -> float:
        parts = trainer.parts
        return evaluate_greedy(parts.collector, trainer.sampler_policy(), parts.eval_tasks, key)[0]["val/success"]

    before, steps = success(), [trainer.step().metrics for _ in range(config.steps)]
    out = {"success": [before, success()]} | {
        name: [m[name] for m in steps]
        for name in ("reward/mean", "sampling/logp_diff_mean", "trust_region/masked_frac")
    }
    print(f"{mode} seed {seed}: {[round(r, 2) for r in out['reward/mean']]} success {out['success']}", flush=True)
    return out


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--naps", type=float, nargs="*", default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    settings = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "asynchrony" / "cpu.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"speed": {}, "learning": {}}
    result: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": date.today().isoformat(),
        "speed": before["speed"] | {str(nap): speed(nap, settings.steps) for nap in settings.naps},
        "learning": before["learning"]
        | {f"{mode} seed {seed}": learning(mode, seed) for seed in settings.seeds for mode in MODES},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
