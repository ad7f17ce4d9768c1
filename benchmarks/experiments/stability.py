"""Which losses hold when the sampler is not quite the policy? After the sanity test of DPPO (arXiv 2602.04879, app. C).

    uv run python benchmarks/experiments/stability.py [--seeds 5] [--steps N] [--workers 2] [--larger] [override ...]

A small model that solves the task one time in five is trained with eight updates a batch, so that the later ones are
off policy; the sampler's last hidden states have noise of three sizes, which every support of the divergence knows
(tokens' log-probabilities are off by .03 and .09 in the mean at step 1). What differs between the methods is the loss
alone: all have group advantages (mean, no deviation) and one learning rate, at which PPO learns where nothing is put
in. 165 runs.

`--larger` takes SmolLM2-135M, 256 episodes a step and 200 steps, for a GPU. What it finds is not known.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from many import Run, play, write

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "experiments" / "stability.jsonl"
BASE = (
    "advantage.type=group",
    "advantage.scale=none",
    "update.minibatches=8",
    "update.microbatch_rows=8",
)
SMALL, LARGER = ("small.yaml", 60), ("larger.yaml", 200)  # the model and its task, and the steps of a run
METHODS: dict[str, tuple[str, ...]] = {
    "ppo": ("loss.type=ppo",),
    "clip_higher": ("loss.type=ppo", "loss.clip_high=0.28"),
    "cispo": ("loss.type=cispo",),
    "minirl": ("loss.type=minirl",),
    "reinforce": ("loss.type=reinforce",),
    "dppo_tv": ("loss.type=dppo",),
    "dppo_kl": ("loss.type=dppo", "loss.divergence=kl"),
    "dppo_topk": ("loss.type=dppo", "loss.support=topk"),
    "dppo_full": ("loss.type=dppo", "loss.support=full"),
    "dppo_full_kl": ("loss.type=dppo", "loss.support=full", "loss.divergence=kl"),
    "dppo_old": ("loss.type=dppo", "loss.anchor=old"),
}
LEVELS = {"none": "0", "some": "0.2", "much": "0.6"}


def runs(larger: bool, seeds: int, steps: int | None, more: Sequence[str]) -> list[Run]:
    """All that is compared."""
    config, usual = LARGER if larger else SMALL
    base = (f"config={HERE / config}", *BASE)
    noise = {level: f"rollout.mismatch.hidden_noise={size}" for level, size in LEVELS.items()}
    return [
        Run(method, level, seed, (*base, *METHODS[method], noise[level], f"steps={steps or usual}", *more))
        for seed in range(seeds)
        for level in LEVELS
        for method in METHODS
    ]


def main() -> None:
    """Do the runs and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--larger", action="store_true", help="a model and batches for a GPU")
    parser.add_argument("--folder", type=Path, default=Path("runs/stability"), help="of the runs")
    parser.add_argument("--out", type=Path, default=RESULT, help="of the rows")
    parser.add_argument("overrides", nargs="*", default=[])
    asked = parser.parse_args()
    every = runs(asked.larger, asked.seeds, asked.steps, asked.overrides)
    todo = [run for run in every if run.method in asked.methods and run.setting in asked.levels]
    done = play(todo, asked.folder, asked.workers)
    about = {"base": BASE, "methods": METHODS, "levels": LEVELS, "overrides": asked.overrides}
    write(asked.out, done, about)


if __name__ == "__main__":
    main()
