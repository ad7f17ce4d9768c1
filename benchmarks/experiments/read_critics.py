"""Tables and plots of the experiment on critics: `python benchmarks/experiments/read_critics.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from measures import WINDOW, Measure, Run, at_end, of, over_seeds, read, text, throughout

from ppojax.statistics import interquartile_mean, probability_of_improvement

matplotlib.use("agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent.parent / "results" / "experiments"
REWARD, EXPLAINED = "reward/mean", "critic/vf_explained_var"
BASELINE = "grpo_8"


def seconds(runs: Sequence[Run]) -> float:
    """Seconds of a step: the lowest tenth over steps and seeds, for other work on the machine only adds to them."""
    return float(np.percentile(np.concatenate([run.series("timing_s/step")[1:] for run in runs]), 10))


def by(step: int) -> Measure:
    """The mean reward over the steps up to this one."""
    return lambda run: float(np.mean(run.series(REWARD)[max(0, step - WINDOW) : step]))


def table(runs: Sequence[Run], methods: Sequence[str], horizon: str) -> str:
    """Markdown: at equal episodes and at equal time, a line for each method."""
    baseline = of(runs, BASELINE, horizon)
    clock = seconds(baseline)
    lines = [
        f"| {horizon} turns | reward | better than GRPO | s a step | reward in GRPO's time | explained variance |",
        "|---" * 6 + "|",
    ]
    for method in methods:
        seeds = of(runs, method, horizon)
        mine = seconds(seeds)
        in_time = min(len(seeds[0].series(REWARD)), int(len(baseline[0].series(REWARD)) * clock / mine))
        end = at_end(REWARD)
        won = probability_of_improvement(*(np.array([end(r) for r in side]) for side in (seeds, baseline)),
                                         *(np.zeros(len(side), np.int64) for side in (seeds, baseline)))  # fmt: skip
        explained = "" if method.startswith(("grpo", "mean")) else text(over_seeds(seeds, throughout(EXPLAINED)))
        cells = (
            text(over_seeds(seeds, end)),
            text(won),
            f"{mine:.2f}",
            text(over_seeds(seeds, by(in_time))),
            explained,
        )
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Sequence[Run], methods: Sequence[str], horizons: Sequence[str], path: Path) -> None:
    """Interquartile means over the seeds: rewards by episodes above, by seconds below."""
    figure, axes = plt.subplots(2, len(horizons), figsize=(4 * len(horizons), 6), sharey=True, squeeze=False)
    for column, horizon in enumerate(horizons):
        for color, method in zip(matplotlib.color_sequences["tab10"], methods, strict=False):
            seeds = of(runs, method, horizon)
            reward = interquartile_mean(np.array([run.series(REWARD) for run in seeds]))
            smooth = np.convolve(reward, np.ones(5) / 5, mode="valid")
            line = "--" if method.startswith(("grpo", "mean")) else "-"
            style = {"color": color, "label": method, "linewidth": 1.1, "linestyle": line}
            step = np.arange(len(smooth)) + 5
            axes[0, column].plot(step, smooth, **style)
            axes[1, column].plot(step * seconds(seeds), smooth, **style)
        axes[0, column].set(title=f"{horizon} turns", xlabel="step")
        axes[1, column].set(xlabel="seconds")
    axes[0, 0].legend(fontsize=6)
    axes[0, 0].set_ylabel("reward")
    axes[1, 0].set_ylabel("reward")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print a table for each horizon, and draw."""
    head, runs = read(FOLDER / "critics.jsonl")
    there = {(run.method, run.setting) for run in runs}
    horizons = [h for h in head["horizons"] if any((m, h) in there for m in head["methods"])]
    methods = [m for m in head["methods"] if all((m, h) in there for h in horizons)]
    for horizon in horizons:
        print(table(runs, methods, horizon), end="\n\n")
    draw(runs, methods, horizons, FOLDER / "critics.png")


if __name__ == "__main__":
    main()
