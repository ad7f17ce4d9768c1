"""When does a critic pay, and how small may it be? PPO with mini-critics against GRPO as walks get longer.

    uv run python benchmarks/experiments/critics.py [--seeds 5] [--steps N] [--workers 2] [--larger] [override ...]

The environment is `warehouse`: 4, 16 or 64 turns, four or eight of which decide, one reward at the end. All methods of
a horizon play equally many episodes a step, so that sampled tokens are equal but for what the policies do; by the clock
a critic pays for itself or not, and the rows have both. Groups are of 8 episodes of a task, or of one alone, where the
baseline is a critic or the mean over the batch (`mean_1`). Critics are the actor's first blocks: all four, two, one, or
two critics of one block each. `cut` methods keep the last turn only of a context over a limit. All runs of a horizon
start from one policy, which learnt from demonstrations first; seeds are those of tasks and draws.

`--larger` takes SmolLM2-135M with all its text, eight times the episodes and four times the steps, for a GPU. What it
finds is not known.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from many import Run, play, write

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "experiments" / "critics.jsonl"
GROUP = 8
MINIBATCHES = 4
GAE = ("advantage.type=gae", "advantage.lambda_policy=1.0")
CUT = ("rollout.compaction.type=truncate", "rollout.compaction.keep_turns=1", "rollout.compaction.most=32")
GRPO = ("advantage.type=group", "advantage.scale=none")
MEAN = ("advantage.type=group", "advantage.baseline=none", "advantage.scale=none", "advantage.whiten=batch")
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


@dataclass(frozen=True)
class Scale:
    """A model, and the walks that it is sent on."""

    config: str
    layers: int
    horizons: dict[str, Horizon]

    @property
    def methods(self) -> dict[str, tuple[str, ...]]:
        """What is compared; a name ends with the size of its groups."""
        sizes = {"whole": self.layers, "half": self.layers // 2, "quarter": self.layers // 4}
        critics: dict[str, tuple[str, ...]] = {
            name: (f"critic.model.layers={layers}",) for name, layers in sizes.items()
        }
        quarter = critics["quarter"]
        critics["pair"] = (*quarter, "critic.count=2")
        return {
            "grpo_8": GRPO,
            **{f"{name}_8": (*GAE, *critic) for name, critic in critics.items()},
            "pair_8": (*GAE, *quarter, "critic.count=2"),
            "quarter_1": (*GAE, *quarter),
            "mean_1": MEAN,
            "grpo_8_cut": (*GRPO, *CUT),
            "quarter_8_cut": (*GAE, *quarter, *CUT),
        }

    def walk(self, horizon: str, group: int = GROUP) -> tuple[str, ...]:
        """What all runs of a horizon share, but for the size of their groups."""
        size = self.horizons[horizon]
        grouped = f"rollout.prompts={size.episodes // group}", f"rollout.group_size={group}"
        length = f"env.turns={horizon}", f"rollout.max_tokens={size.tokens}", f"env.shelves={size.shelves}"
        rows = min(8, size.episodes // MINIBATCHES)
        update = f"update.minibatches={MINIBATCHES}", f"update.microbatch_rows={rows}"
        # Sharing prompts needs whole groups in a microbatch.
        torn = () if rows >= GROUP else ("update.shared_prefix=false",)
        return f"config={HERE / self.config}", *length, *grouped, *update, *torn

    def lesson(self, horizon: str, folder: Path) -> tuple[str, ...]:
        """The demonstrations; a training step is the least that a run does, and this one changes nothing."""
        size = self.horizons[horizon]
        known = () if size.after is None else from_folder(folder / f"start-{size.after}")
        still = ("advantage.type=group", "actor.optimizer.learning_rate=1e-12", "steps=1")
        return (*self.walk(horizon), *known, *size.learn, *still)

    def run(self, method: str, horizon: str, folder: Path, steps: int | None) -> tuple[str, ...]:
        """The arguments of one run."""
        size = self.horizons[horizon]
        cut = (f"rollout.compaction.limit={size.limit}",) if method.endswith("_cut") else ()
        walk = self.walk(horizon, 1 if method.endswith("_1") else GROUP)
        start = (*from_folder(folder / f"start-{horizon}"), "warm_start=null", f"steps={steps or size.steps}")
        return (*walk, *start, *self.methods[method], *cut)


SMALL = Scale(
    "walk.yaml",
    4,
    {
        "4": Horizon(48, 40, 4, 32, 100, ("env.shelves=4", "warm_start.steps=800", "warm_start.corrupt=0.5")),
        "16": Horizon(160, 64, 8, 32, 30, ("env.shelves=8", "warm_start.steps=700")),
        "64": Horizon(
            592, 96, 8, 16, 16, ("env.shelves=32", "warm_start.steps=150", "warm_start.rows=8", SLOWER), after="16"
        ),
    },
)
LARGER = Scale(
    "walk_larger.yaml",
    30,
    {
        horizon: replace(
            size, tokens=tokens, limit=limit, episodes=8 * size.episodes, steps=4 * size.steps, learn=(), after=None
        )
        for (horizon, size), tokens, limit in zip(
            SMALL.horizons.items(), (192, 448, 1472), (160, 224, 320), strict=True
        )
    },
)


def from_folder(path: Path) -> tuple[str, ...]:
    """Start from an exported policy."""
    return f"model.path={path}", "model.fresh=null", "model.tokenizer=null"


def first_policy(scale: Scale, horizon: str, folder: Path) -> None:
    """Make the policy that a horizon's runs start from, where it is not there yet."""
    out, before = folder / f"start-{horizon}", scale.horizons[horizon].after
    if out.is_dir():
        return
    if before is not None:
        first_policy(scale, before, folder)
    run = Run("start", horizon, 0, scale.lesson(horizon, folder))
    play([run], folder, 1)
    export = [f"run={folder / run.name}", f"out={out}", "dtype=float32"]
    subprocess.run([sys.executable, "-m", "ppojax.export", *export], check=True)


def runs(scale: Scale, folder: Path, seeds: int, steps: int | None, more: Sequence[str]) -> list[Run]:
    """All that is compared."""
    return [
        Run(method, horizon, seed, (*scale.run(method, horizon, folder, steps), *more))
        for horizon in scale.horizons
        for method in scale.methods
        for seed in range(seeds)
    ]


def main() -> None:
    """Do the runs and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of each run, in place of the horizon's own number")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--horizons", nargs="+", help="only these")
    parser.add_argument("--larger", action="store_true", help="a model and batches for a GPU")
    parser.add_argument("--folder", type=Path, default=Path("runs/critics"), help="of the runs")
    parser.add_argument("--out", type=Path, default=RESULT, help="of the rows")
    parser.add_argument("overrides", nargs="*", default=[])
    asked = parser.parse_args()
    scale = LARGER if asked.larger else SMALL
    todo = [
        run
        for run in runs(scale, asked.folder, asked.seeds, asked.steps, asked.overrides)
        if run.method in (asked.methods or [run.method]) and run.setting in (asked.horizons or [run.setting])
    ]
    for horizon in dict.fromkeys(run.setting for run in todo):
        first_policy(scale, horizon, asked.folder)
    done = play(todo, asked.folder, asked.workers)
    about = {"methods": scale.methods, "horizons": list(scale.horizons), "overrides": asked.overrides}
    write(asked.out, done, about)


if __name__ == "__main__":
    main()
