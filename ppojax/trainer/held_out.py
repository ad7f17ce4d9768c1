"""The policy of a checkpoint on held-out tasks."""

from __future__ import annotations

from collections.abc import Sequence

from ppojax.config import Config
from ppojax.envs import Task
from ppojax.errors import DataError
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.rundir import RunDir
from ppojax.trainer.build import EVALUATE, OUTSIDE, purpose_key
from ppojax.trainer.evaluation import evaluate_greedy, evaluate_samples
from ppojax.trainer.trainer import Trainer
from ppojax.update.state import abstract_state


def evaluate_run(
    config: Config, run: RunDir, tasks: Sequence[Task], *, checkpoint: int | None, samples: int, seed: int
) -> tuple[int, dict[str, float]]:
    """Restore a checkpoint of a run, the newest intact one for None, and play `tasks` greedily and by sampling.

    Nothing in the run is written, so a run that goes on can be evaluated.

    Returns:
        The step of the checkpoint, and the metrics of `evaluate_greedy` and `evaluate_samples`.

    Raises:
        DataError: there is no such checkpoint, or it is damaged.
    """
    trainer = restored(config, run, checkpoint)
    collector, params = trainer.parts.collector, trainer.sampler_policy()
    key = purpose_key(seed, OUTSIDE, EVALUATE)
    metrics, _ = evaluate_greedy(collector, params, tasks, key)
    return trainer.number, metrics | evaluate_samples(collector, params, tasks, key, samples)


def restored(config: Config, run: RunDir, checkpoint: int | None, asked_by: str = "checkpoint") -> Trainer:
    """A trainer in the state of a checkpoint, the newest intact one for None; nothing in the run is written.

    `asked_by` is the setting that says which, for the message.

    Raises:
        DataError: there is no such checkpoint, or it is damaged.
    """
    with Checkpoints(run.checkpoints, config.checkpoint) as checkpoints:
        _check_there(run, checkpoints.latest(), checkpoint, asked_by)
        trainer = Trainer(config)
        state, position = checkpoints.restore(checkpoint, abstract_state(trainer.state()))
    trainer.restore(state, position)
    return trainer


def _check_there(run: RunDir, latest: int | None, wanted: int | None, asked_by: str) -> None:
    if latest is None:
        raise DataError(
            f"{run.checkpoints}: the run has no checkpoint; one is written when it ends, or earlier with "
            "checkpoint.every"
        )
    if wanted is not None and not (run.checkpoints / str(wanted)).is_dir():
        raise DataError(
            f"{asked_by}={wanted}: {run.checkpoints} has none of that step; the newest is {latest}, {asked_by}=latest"
        )
