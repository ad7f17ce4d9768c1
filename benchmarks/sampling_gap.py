"""The gap between sampler and trainer on configs/tiny.yaml: as it is, put in on purpose, and with exact sampling.

    uv run python benchmarks/sampling_gap.py [--steps 8] [--seed 0]

Every variant starts from the same warm start and trains by itself. The first step is of the same weights everywhere;
the later ones are of whatever training made of them. Results go to benchmarks/results/sampling_gap/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from datetime import date
from pathlib import Path

import jax

from ppojax.config import Config
from ppojax.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "sampling_gap" / "cpu.json"
GAP = ("sampling/logp_diff_mean", "sampling/logp_diff_max", "sampling/ratio_mean")
SHAPES = ("update.shared_prefix=false", "model.remat=full")  # what exact sampling needs
VARIANTS: dict[str, tuple[str, ...]] = {
    "float32": (),
    **{f"logit noise {x}": (f"rollout.mismatch.logit_noise={x}",) for x in (0.01, 0.1, 1.0)},
    **{f"stale by {n}": (f"rollout.mismatch.stale_steps={n}",) for n in (1, 2, 4)},
    "int8 cache": ("rollout.mismatch.cache=int8",),
    "float16 sampler": ("rollout.dtype=float16",),
    "bfloat16 sampler": ("rollout.dtype=bfloat16",),
    "bfloat16 both": ("model.dtype=bfloat16",),
    "float32, rows read alone": SHAPES,
    "exact": (*SHAPES, "rollout.exact=true"),
}


def main() -> None:
    """Train each variant and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    shared = ("config=configs/tiny.yaml", f"seed={settings.seed}")
    warm = Trainer(Config.load(*shared))
    warm.warm_start()
    state, position = jax.device_get(warm.state()), warm.position()
    result: dict = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": date.today().isoformat(),
        "settings": vars(settings),
    }
    for name, arguments in VARIANTS.items():
        trainer = Trainer(Config.load(*shared, *arguments))
        start = state | {"older": [state["actor"].params for _ in trainer.older]}
        trainer.restore(
            jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start, trainer.state()), position
        )
        steps = [trainer.step().metrics for _ in range(settings.steps)]
        later = steps[settings.steps // 2 :]
        result[name] = {
            "arguments": arguments,
            "first": {key: steps[0][key] for key in GAP},
            "later": {key: (max if key.endswith("_max") else statistics.fmean)(m[key] for m in later) for key in GAP},
            "reward": [m["reward/mean"] for m in steps],
            "gen_s": statistics.median(m["timing_s/gen"] for m in steps[1:]),
            "update_actor_s": statistics.median(m["timing_s/update_actor"] for m in steps[1:]),
        }
        gap = "  ".join(f"{result[name][when][key]:.2e}" for when in ("first", "later") for key in GAP[:2])
        ratio, reward = result[name]["later"][GAP[2]], result[name]["reward"]
        seconds = f"{result[name]['gen_s']:.2f} s + {result[name]['update_actor_s']:.2f} s"
        print(f"{name:26s} {gap}  ratio {ratio:.6f}  reward {reward[0]:.2f} -> {reward[-1]:.2f}  {seconds}", flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
