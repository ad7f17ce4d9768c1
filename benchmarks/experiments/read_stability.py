"""Tables and plots of the experiment on stability: `python benchmarks/experiments/read_stability.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from measures import Run, at_end, collapsed, fell, of, over_seeds, read, text, throughout

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FOLDER = Path(__file__).parent.parent / "results" / "experiments"
COLUMNS = {
    "reward at the end": at_end("reward/mean"),
    "KL to the old policy": throughout("actor/ppo_kl"),
    "entropy at the end": at_end("actor/entropy"),
    "share masked or clipped": throughout("trust_region/masked_frac", "actor/pg_clipfrac"),
}


def table(runs: Sequence[Run], methods: Sequence[str], level: str) -> str:
    """Markdown: a line for each method, an interquartile mean and its interval for each measure."""
    lines = [f"| {level} | fell | stayed down | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|"]
    for method in methods:
        seeds = of(runs, method, level)
        fallen = " | ".join(f"{sum(map(count, seeds)):.0f} of {len(seeds)}" for count in (fell, collapsed))
        cells = [text(over_seeds(seeds, measure), 2 if "reward" in name else 3) for name, measure in COLUMNS.items()]
        lines.append(f"| {method} | {fallen} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Sequence[Run], methods: Sequence[str], levels: Sequence[str], path: Path) -> None:
    """A curve for each seed and the mean over them, methods in rows and levels in columns."""
    size = (3 * len(levels), 1.3 * len(methods))
    figure, axes = plt.subplots(len(methods), len(levels), sharex=True, sharey=True, figsize=size, squeeze=False)
    for row, method in zip(axes, methods, strict=True):
        for axis, level in zip(row, levels, strict=True):
            curves(axis, of(runs, method, level))
        row[0].set_ylabel(method, fontsize=8)
    for axis, level in zip(axes[0], levels, strict=True):
        axis.set_title(f"mismatch: {level}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=70)


def curves(axis: Axes, seeds: Sequence[Run]) -> None:
    """Rewards of each seed, and their mean where all are."""
    rewards = [run.series("reward/mean") for run in seeds]
    for reward in rewards:
        axis.plot(reward, color="#0b6e99", alpha=0.35, linewidth=0.8)
    shortest = min(map(len, rewards))
    axis.plot(np.mean([reward[:shortest] for reward in rewards], axis=0), color="#d1495b", linewidth=1.2)
    axis.set_ylim(-0.03, 1.03)
    axis.tick_params(labelsize=7)


def main() -> None:
    """Print a table for each level of mismatch, and draw."""
    head, runs = read(FOLDER / "stability.jsonl")
    methods, levels = list(head["methods"]), list(head["levels"])
    for level in levels:
        print(table(runs, methods, level), end="\n\n")
    draw(runs, methods, levels, FOLDER / "stability.png")


if __name__ == "__main__":
    main()
