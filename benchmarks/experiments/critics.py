"""When does a critic pay, and how small may it be? PPO with mini-critics against GRPO as walks get longer.

    uv run python benchmarks/experiments/critics.py [--seeds 5] [--steps N] [--workers 2] [override ...]

The environment is `warehouse`: 4, 16 or 64 turns, four or eight of which decide, one reward at the end. All methods of
a horizon play equally many episodes a step, so that sampled tokens are equal but for what the policies do; by the clock
a critic pays for itself or not, and the rows have both. Groups are of 8 episodes of a task, or of one alone, where the
baseline is a critic or the mean over the batch (`mean_1`). Critics are the actor's first blocks: all four, two, one, or
two critics of one block each. `cut` methods keep the last turn only of a context over a limit. All runs of a horizon
start from one policy, which learnt from demonstrations first; seeds are those of tasks and draws. At a larger scale:
overrides behind the base, such as `model.path=smollm2 env.system=...`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from many import Run, play, write

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "experiments" / "critics.jsonl"
GROUP = 8
GAE = ("advantage.type=gae", "advantage.lambda_policy=1.0")
CRITICS: dict[str, tuple[str, ...]] = {
    "whole": ("critic.model.layers=4",),
    "half": ("critic.model.layers=2",),
    "quarter": ("critic.model.layers=1",),
    "pair": ("critic.model.layers=1", "critic.count=2"),
}
CUT = ("rollout.compaction.type=truncate", "rollout.compaction.keep_turns=1", "rollout.compaction.most=32")
GRPO = ("advantage.type=group", "advantage.scale=none")
# A name ends with the size of its groups.
METHODS: dict[str, tuple[str, ...]] = {
    "grpo_8": GRPO,
    **{f"{name}_8": (*GAE, *critic) for name, critic in CRITICS.items()},
    "quarter_1": (*GAE, *CRITICS["quarter"]),
    "mean_1": ("advantage.type=group", "advantage.baseline=none", "advantage.scale=none", "advantage.whiten=batch"),
    "grpo_8_cut": (*GRPO, *CUT),
    "quarter_8_cut": (*GAE, *CRITICS["quarter"], *CUT),
}
SLOWER = "warm_start.optimizer.learning_rate=2e-3"


@dataclass(frozen=True)
class Horizon:
    """A length of walks, and how its first policy is made."""

    tokens: int  # of a row
    limit: int  # of a context that is cut
    shelves: int  # turns that decide
    episodes: int  # of a step
    steps: int
    learn: tuple[str, ...]  # of the demonstrations; with more shelves there is more to learn from each
    after: str | None = None  # the horizon whose first policy is taught on


HORIZONS = {
    "4": Horizon(48, 40, 4, 32, 100, ("env.shelves=4", "warm_start.steps=800", "warm_start.corrupt=0.5")),
    "16": Horizon(160, 64, 8, 32, 30, ("env.shelves=8", "warm_start.steps=700")),
    "64": Horizon(
        592, 96, 8, 16, 16, ("env.shelves=32", "warm_start.steps=150", "warm_start.rows=8", SLOWER), after="16"
    ),
}


def groups(horizon: str, of: int = GROUP) -> tuple[str, str]:
    """How a step's episodes are grouped."""
    return f"rollout.prompts={HORIZONS[horizon].episodes // of}", f"rollout.group_size={of}"


def walk(horizon: str) -> tuple[str, ...]:
    """What all runs of a horizon share."""
    size = HORIZONS[horizon]
    config = f"config={HERE / 'walk.yaml'}"
    return config, f"env.turns={horizon}", f"rollout.max_tokens={size.tokens}", f"env.shelves={size.shelves}"


def first_policy(horizon: str, folder: Path) -> Path:
    """The policy that a horizon's runs start from, as a folder; made where it is not there yet."""
    size, out = HORIZONS[horizon], folder / f"start-{horizon}"
    if out.is_dir():
        return out
    known = () if size.after is None else from_folder(first_policy(size.after, folder))
    # A training step is the least that a run does: one that changes nothing.
    still = ("advantage.type=group", "actor.optimizer.learning_rate=1e-12", "steps=1")
    run = Run("start", horizon, 0, (*walk(horizon), *groups(horizon), *known, *size.learn, *still))
    play([run], folder, 1)
    export = [f"run={folder / run.name}", f"out={out}", "dtype=float32"]
    subprocess.run([sys.executable, "-m", "ppojax.export", *export], check=True)
    return out


def from_folder(path: Path) -> tuple[str, ...]:
    """Start from an exported policy."""
    return f"model.path={path}", "model.fresh=null", "model.tokenizer=null"


def arguments(method: str, horizon: str, steps: int | None, start: Path) -> tuple[str, ...]:
    """Of one run."""
    size = HORIZONS[horizon]
    cut = (f"rollout.compaction.limit={size.limit}",) if method.endswith("_cut") else ()
    grouped = groups(horizon, 1 if method.endswith("_1") else GROUP)
    shared = (*walk(horizon), *from_folder(start), *grouped, "warm_start=null", f"steps={steps or size.steps}")
    return (*shared, *METHODS[method], *cut)


def main() -> None:
    """Do the runs and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of each run, in place of the horizon's own number")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--horizons", nargs="+", default=list(HORIZONS))
    parser.add_argument("--folder", type=Path, default=Path("runs/critics"), help="of the runs")
    parser.add_argument("overrides", nargs="*", default=[])
    asked = parser.parse_args()
    start = {horizon: first_policy(horizon, asked.folder) for horizon in asked.horizons}
    runs = [
        Run(method, horizon, seed, (*arguments(method, horizon, asked.steps, start[horizon]), *asked.overrides))
        for horizon in asked.horizons
        for method in asked.methods
        for seed in range(asked.seeds)
    ]
    done = play(runs, asked.folder, asked.workers)
    write(RESULT, done, {"methods": METHODS, "horizons": list(HORIZONS), "overrides": asked.overrides})


if __name__ == "__main__":
    main()
