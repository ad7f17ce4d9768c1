"""The learning tests: configs/tiny.yaml, by its command, learns, and so does a smaller model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppojax.runtime.metrics import read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SMALLER = (
    "model.fresh={layers: 2, width: 96, ffn: 288}",
    "critic.model.layers=1",
    "warm_start.steps=100",
    "steps=6",
    "eval.every=6",
)
ADAPTERS = (
    "model.lora.rank=32",
    "model.lora.alpha=32",
    "critic.lora.rank=32",
    "critic.lora.alpha=32",
    "critic.optimizer.learning_rate=3e-3",
    "warm_start.steps=400",
    "warm_start.optimizer.learning_rate=4e-3",
    "warm_start.optimizer.schedule=cosine",
    "warm_start.optimizer.decay_steps=400",
    "critic.updates=3",
    "steps=14",
)


Learnt = tuple[list[dict[str, Any]], dict[str, Any], list[float]]


def learn(folder: Path, *overrides: str, optimized: bool = True) -> Learnt:
    """Run the command as a user does, or with programs that are compiled in less time and run as these tests' do.

    Returns:
        The rows of its steps; the last row, which has the evaluation; the first and the last loss of the warm start.
    """
    flags = "" if optimized else os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    env = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "ppojax.train", f"config={CONFIG}", f"run.dir={folder}", *overrides]
    done = subprocess.run(command, env=env, cwd=CONFIG.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(folder / "tiny" / "metrics.jsonl")
    warm = re.search(r"warm start: \d+ supervised steps, loss ([\d.]+) -> ([\d.]+)", done.stdout + done.stderr)
    assert warm, done.stdout
    return [row for row in rows if "reward/mean" in row], rows[-1], [float(loss) for loss in warm.groups()]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(SMALLER, id="smaller"),
        pytest.param((), id="sync", marks=pytest.mark.slow),
        pytest.param(("rollout.mode=one_step_off",), id="one_step_off", marks=pytest.mark.slow),
    ],
)
def test_tiny_learns_the_tool_call(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """From one success in three or less to over three in four; the critic explains returns before rewards settle."""
    steps, last, losses = learn(tmp_path, *overrides, optimized=overrides != SMALLER)
    assert losses[1] < 0.2 * losses[0]
    reward = np.array([row["reward/mean"] for row in steps])
    varied = [row["critic/vf_explained_var"] for row in steps[2:] if row["reward/std"] > 0.2]
    assert reward[0] < 0.35, reward
    assert reward[-3:].mean() > 0.75, reward
    assert np.mean([v > 0 for v in varied]) > 0.7, varied
    assert last["val/success_low"] > 0.6, (reward, last)


@pytest.mark.slow
def test_tiny_learns_with_adapters_on_a_frozen_random_base(tmp_path: Path) -> None:
    """Actor and critic, at the rate of tiny.yaml: measured .24 -> .91 and .26 -> .87 with seeds 0 and 1.

    The critic's explained variance goes up and down: over the last six steps .27 and .12. With a learning rate of 1e-3
    the first update went to .72, but a run fell from .87 at step 4 to .36 at step 6.
    """
    steps, last, _ = learn(tmp_path, *ADAPTERS)
    reward = np.array([row["reward/mean"] for row in steps])
    assert reward[0] < 0.4 and reward[-4:].mean() > 0.6, reward
    assert np.mean([row["critic/vf_explained_var"] for row in steps[-6:]]) > 0.1
    assert last["val/success_low"] > 0.5, (reward, last)
