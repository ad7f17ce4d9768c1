"""Which losses hold when the sampler is not quite the policy? After the sanity test of DPPO (arXiv 2602.04879, app. C).

    uv run python benchmarks/experiments/stability.py [--seeds 5] [--steps 60] [--workers 2] [override ...]

A small model that solves the task one time in four is trained with eight updates a batch, so that the later ones are
off policy; the sampler's last hidden states have noise of three sizes, which every support of the divergence knows
(tokens' log-probabilities are off by .04 and .1 in the mean). What differs between the methods is the loss alone: all
have group advantages (mean, no deviation) and one learning rate, at which PPO learns where nothing is put in. 165 runs.
At a larger scale: overrides such as `config=configs/quickstart_grpo.yaml steps=200` go behind the base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from many import Run, play, write

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "experiments" / "stability.jsonl"
BASE = (
    f"config={HERE / 'small.yaml'}",
    "advantage.type=group",
    "advantage.scale=none",
    "update.minibatches=8",
    "update.microbatch_rows=8",
)
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


def main() -> None:
    """Do the runs and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--folder", type=Path, default=Path("runs/stability"))
    parser.add_argument("overrides", nargs="*", default=[])
    asked = parser.parse_args()
    runs = [
        Run(
            method,
            level,
            seed,
            (
                *BASE,
                *METHODS[method],
                f"rollout.mismatch.hidden_noise={LEVELS[level]}",
                f"steps={asked.steps}",
                *asked.overrides,
            ),
        )
        for seed in range(asked.seeds)
        for level in asked.levels
        for method in asked.methods
    ]
    done = play(runs, asked.folder, asked.workers)
    write(RESULT, done, {"base": BASE, "methods": METHODS, "levels": LEVELS, "overrides": asked.overrides})


if __name__ == "__main__":
    main()
