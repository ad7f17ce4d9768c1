"""A run of a second a step, as arguments of the command line."""

from __future__ import annotations

from pathlib import Path

from ppojax.config import Config

TINY = (
    "env.type=calculator",
    "env.low=0",
    "env.high=5",
    "env.system=''",
    "env.prompt='{question}'",
    "env.example=null",
    "model.fresh.layers=1",
    "model.fresh.width=32",
    "model.fresh.heads=2",
    "model.fresh.kv_heads=2",
    "model.fresh.ffn=32",
    "model.tokenizer=char",
    "rollout.prompts=4",
    "rollout.group_size=2",
    "rollout.max_turn_tokens=16",
    "rollout.max_tokens=64",
    "rollout.prompt_bucket=16",
    "rollout.bucket=64",
    # Whole batches whatever the machine is busy with: runs are compared bit by bit.
    "rollout.workers=0",
    "critic.model.layers=1",
    "update.minibatches=2",
    "update.microbatch_rows=4",
    # Without it no reward is ever earned, and nothing would be learnt.
    "warm_start.steps=60",
    "warm_start.rows=8",
    "warm_start.optimizer.learning_rate=1e-2",
    "actor.optimizer.learning_rate=1e-3",
    "eval.every=0",
    "checkpoint.every=0",
    "run.tensorboard=false",
)


def tiny(*arguments: str) -> Config:
    """The tiny config with changes."""
    return Config.load(*TINY, *arguments)


def tiny_run(folder: Path, *arguments: str) -> list[str]:
    """Arguments of a tiny run in `folder`/run."""
    return [*TINY, f"run.dir={folder}", *arguments]
