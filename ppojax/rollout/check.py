"""A look at some tasks before a run: whether their episodes can start."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from ppojax.envs import Task
from ppojax.errors import ConfigError, DataError
from ppojax.rollout.collect import Collector
from ppojax.rollout.episode import LateEnv
from ppojax.rollout.prompts import LongPromptError
from ppojax.rollout.workers import Workers

log = logging.getLogger(__name__)


def check_tasks(collector: Collector, tasks: Sequence[Task]) -> None:
    """Start an episode of each task and write its prompt. A few may fail, as they may in the run: a warning.

    Raises:
        DataError: none can be started, or a prompt is over the limit and `rollout.long_prompts=error`.
        ConfigError: an environment cannot be used on this machine.
    """
    workers = Workers(collector.workers, collector.env_timeout_s)
    jobs = {workers.submit(partial(_start, collector, task), None): task for task in tasks}
    workers.close(wait=True)
    failed = [(task, job.error) for job, task in jobs.items() if job.error is not None]
    for _, error in failed:
        if isinstance(error, LongPromptError | ConfigError):
            raise error
    if not failed:
        return
    task, error = failed[0]
    said = " ".join(str(error).split())
    which = f"the first is task {task.id} ({type(error).__name__}: {said:.200})"
    if len(failed) == len(tasks):
        raise DataError(
            f"env: none of the {len(tasks)} tasks that were tried can be started, expected some; {which}: mend the "
            "environment or its tasks"
        )
    log.warning("%d of %d tasks that were tried cannot be started: %s", len(failed), len(tasks), which)


def _start(collector: Collector, task: Task) -> None:
    env = LateEnv(collector.env.make)
    try:
        collector.render(task, env.reset(task))
    finally:
        with suppress(Exception):
            env.close()
