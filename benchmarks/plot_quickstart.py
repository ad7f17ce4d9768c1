"""Draw the quickstart's learning curves and print its figures: `python benchmarks/plot_quickstart.py [FOLDER]`.

Reads FOLDER/{ppo,grpo}/seed*.jsonl, copies of the runs' metrics.jsonl, and writes FOLDER/curves.png.
FOLDER is benchmarks/results/quickstart unless given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from ppojax.runtime.metrics import read_metrics

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FOLDER = Path(__file__).parent / "results" / "quickstart"
COLORS = {"ppo": "#0b6e99", "grpo": "#d1495b"}
NAMES = {"ppo": "PPO with a mini-critic", "grpo": "GRPO, no critic"}
MARKS = {"ppo": "o-", "grpo": "s--"}
REWARD, SPREAD, EXPLAINED, SUCCESS = "reward/mean", "reward/std", "critic/vf_explained_var", "val/success"
VARIES = 0.1  # rewards whose standard deviation is below this leave a critic nothing to explain

Row = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Run:
    """The rows of one run."""

    algorithm: str
    seed: str
    rows: list[dict[str, float | int | None]]

    def series(self, name: str, x: Callable[[Row], float]) -> tuple[np.ndarray, np.ndarray]:
        """Pick a metric where it was logged, and the abscissa of each value."""
        there = [row for row in self.rows if row.get(name) is not None]
        return np.array([x(row) for row in there], float), np.array([row[name] for row in there], float)

    def seconds(self, row: Row) -> float:
        """Wall-clock seconds since the run's first row."""
        start, now = self.rows[0]["time"], row["time"]
        assert start is not None and now is not None
        return float(now) - float(start)

    def explains(self) -> int | None:
        """The first step at which the critic explains something while rewards vary."""
        for row in self.rows:
            explained, spread = row.get(EXPLAINED), row.get(SPREAD)
            if explained is not None and spread is not None and explained > 0 and spread > VARIES:
                return int(step(row))
        return None


def step(row: Row) -> float:
    """The number of a row's step."""
    number = row["step"]
    assert number is not None
    return float(number)


def load(folder: Path) -> list[Run]:
    """Read every run below a folder, a line that a crash tore left out."""
    return [
        Run(algorithm, path.stem.removeprefix("seed"), read_metrics(path))
        for algorithm in COLORS
        for path in sorted((folder / algorithm).glob("seed*.jsonl"))
    ]


def curves(axes: Axes, runs: Sequence[Run], name: str, x: Callable[[Run], Callable[[Row], float]]) -> None:
    """Draw a metric of every run thinly, and the mean of each algorithm's runs."""
    for algorithm, color in COLORS.items():
        drawn = [run.series(name, x(run)) for run in runs if run.algorithm == algorithm]
        drawn = [(at, value) for at, value in drawn if len(at)]
        for at, value in drawn:
            axes.plot(at, value, color=color, linewidth=0.7, alpha=0.45)
        if drawn:
            # Over the range that all runs cover: a mean over fewer of them would jump.
            at = np.linspace(max(a[0] for a, _ in drawn), min(a[-1] for a, _ in drawn), 200)
            mean = np.mean([np.interp(at, *run) for run in drawn], axis=0)
            axes.plot(at, mean, color=color, linewidth=2, label=NAMES[algorithm])


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw four panels of 1200 x 400 pixels in all."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 4, figsize=(12, 4), dpi=100, layout="constrained")
    curves(panels[0], runs, REWARD, lambda _: step)
    curves(panels[1], runs, REWARD, lambda run: run.seconds)
    curves(panels[2], runs, EXPLAINED, lambda _: step)
    for run in runs:
        at, value = run.series(SUCCESS, step)
        panels[3].plot(at, value, MARKS[run.algorithm], color=COLORS[run.algorithm], ms=4, lw=0.7, alpha=0.6)
    labels = (
        ("reward/mean by step", "step"),
        ("reward/mean by wall-clock", "seconds since the first evaluation"),
        ("critic/vf_explained_var", "step"),
        ("greedy success, held-out tasks", "step"),
    )
    for panel, (title, x) in zip(panels, labels, strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(x)
        panel.grid(alpha=0.2)
        panel.set_ylim(-0.03, 1.03)
    # An untrained critic may start far below zero; what matters is where it crosses.
    panels[2].set_ylim(-1.05, 1.03)
    panels[2].axhline(0, color="black", linewidth=0.8)
    panels[0].legend(loc="lower right", frameon=False)
    figure.savefig(path)
    plt.close(figure)


def table(runs: Sequence[Run]) -> Table:
    """List the figures of each run."""
    out = Table("run", "reward: first", "last", "success: first", "last", "seconds", "explains")
    for run in runs:
        _, reward = run.series(REWARD, step)
        _, success = run.series(SUCCESS, step)
        ends = [f"{values[i]:.3f}" if len(values) else "-" for values in (reward, success) for i in (0, -1)]
        explains = run.explains()
        seconds = f"{run.seconds(run.rows[-1]):.0f}"
        out.add_row(f"{run.algorithm} {run.seed}", *ends, seconds, "-" if explains is None else str(explains))
    return out


def main(folder: Path) -> int:
    """Draw and print; 1 when there is nothing to read."""
    runs = load(folder)
    if not runs:
        print(f"{folder}: no ppo/seed*.jsonl and no grpo/seed*.jsonl; copy the metrics.jsonl of runs there")
        return 1
    draw(runs, folder / "curves.png")
    Console().print(table(runs))
    print("success: greedy, on held-out tasks; seconds: since the end of the first evaluation")
    print(f"explains: the first step with {EXPLAINED} > 0 while {SPREAD} > {VARIES}")
    print(folder / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
