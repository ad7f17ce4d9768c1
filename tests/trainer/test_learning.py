"""The learning test: configs/tiny.yaml, as committed, learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ppojax.config import Config
from ppojax.trainer import Trainer
from ppojax.trainer.build import EVALUATE, OUTSIDE, purpose_key
from ppojax.trainer.evaluation import evaluate_greedy

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def test_tiny_learns_the_tool_call() -> None:
    """From one success in three or less to over three in four; the critic explains returns before rewards settle."""
    config = Config.load(f"config={CONFIG}")
    trainer = Trainer(config)
    losses = trainer.warm_start()
    assert losses[-1] < 0.2 * losses[0]
    steps = [trainer.step().metrics for _ in range(config.steps)]
    reward = np.array([m["reward/mean"] for m in steps])
    varied = [m["critic/vf_explained_var"] for m in steps[2:] if m["reward/std"] > 0.2]
    key = purpose_key(config.seed, OUTSIDE, EVALUATE)
    tasks, rows = trainer.parts.eval_tasks, config.rollout.rows
    greedy, _ = evaluate_greedy(trainer.parts.collector, trainer.states.actor.params, tasks, rows, key)
    assert reward[0] < 0.35, reward
    assert reward[-3:].mean() > 0.75, reward
    assert np.mean([v > 0 for v in varied]) > 0.7, varied
    assert greedy["val/success_low"] > 0.6, (reward, greedy)
