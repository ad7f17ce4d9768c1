"""When does a critic pay, and how small may it be? PPO with mini-critics against GRPO as walks get longer.

    uv run python benchmarks/experiments/critics.py [--seeds 5] [--steps 24] [--workers 2] [override ...]

The environment is `warehouse`: 4, 16 or 64 turns, four of which decide, one reward at the end. Every method plays the
same number of episodes a step, so that sampled tokens are equal but for what the policies do; by the clock a critic
pays for itself or not, and the rows have both. Groups are of 8 episodes of a task, or of one alone, where only a critic
can say what was good. Critics are the actor's first blocks: all four, two, one, or two critics of one block each. `cut`
methods keep the last turn only of a context over a limit. At a larger scale: overrides behind the base, such as
`model.path=smollm2 model.fresh=null model.tokenizer=null`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from many import Run, play, write

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "experiments" / "critics.jsonl"
GROUPS = ("rollout.prompts=8", "rollout.group_size=8")
ALONE = ("rollout.prompts=64", "rollout.group_size=1")
GAE = ("advantage.type=gae", "advantage.lambda_policy=1.0")
CRITICS: dict[str, tuple[str, ...]] = {
    "whole": ("critic.model.layers=4",),
    "half": ("critic.model.layers=2",),
    "quarter": ("critic.model.layers=1",),
    "pair": ("critic.model.layers=1", "critic.count=2"),
}
CUT = ("rollout.compaction.type=truncate", "rollout.compaction.keep_turns=1", "rollout.compaction.most=32")
METHODS: dict[str, tuple[str, ...]] = {
    "grpo_8": (*GROUPS, "advantage.type=group", "advantage.scale=none"),
    **{f"{name}_8": (*GROUPS, *GAE, *critic) for name, critic in CRITICS.items()},
    **{f"{name}_1": (*ALONE, *GAE, *critic) for name, critic in CRITICS.items()},
    "grpo_8_cut": (*GROUPS, "advantage.type=group", "advantage.scale=none", *CUT),
    "quarter_8_cut": (*GROUPS, *GAE, *CRITICS["quarter"], *CUT),
}
# Turns, and the tokens of a row and of a context that is cut.
HORIZONS = {"4": (48, 40), "16": (160, 64), "64": (592, 96)}


def arguments(method: str, horizon: str, steps: int) -> tuple[str, ...]:
    """Of one run."""
    tokens, limit = HORIZONS[horizon]
    cut = (f"rollout.compaction.limit={limit}",) if method.endswith("_cut") else ()
    size = (f"rollout.max_tokens={tokens}", f"env.turns={horizon}", f"steps={steps}")
    return (f"config={HERE / 'walk.yaml'}", *METHODS[method], *cut, *size)


def main() -> None:
    """Do the runs and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--horizons", nargs="+", default=list(HORIZONS))
    parser.add_argument("--folder", type=Path, default=Path("runs/critics"))
    parser.add_argument("overrides", nargs="*", default=[])
    asked = parser.parse_args()
    runs = [
        Run(method, horizon, seed, (*arguments(method, horizon, asked.steps), *asked.overrides))
        for seed in range(asked.seeds)
        for horizon in asked.horizons
        for method in asked.methods
    ]
    done = play(runs, asked.folder, asked.workers)
    write(RESULT, done, {"methods": METHODS, "horizons": HORIZONS, "overrides": asked.overrides})


if __name__ == "__main__":
    main()
