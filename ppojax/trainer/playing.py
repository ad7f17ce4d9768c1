"""The batch of a step: played again with other tasks where too much of it fails."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax

from ppojax.envs import Task
from ppojax.errors import DataError
from ppojax.rollout.prompts import LongPrompt
from ppojax.rollout.settings import RolloutConfig
from ppojax.types import Ending, Rollout, Row

PAUSE_S = 1.0  # before the first try again, doubled for each further one: what failed may come back


def play_batch(
    play: Callable[[Sequence[Task], jax.Array], Rollout],
    tasks: Iterator[Sequence[Task]],
    key: jax.Array,
    limits: RolloutConfig,
    pause: Callable[[float], object] | None = None,
) -> Rollout:
    """Play the next tasks; where over `max_failed` of the episodes fail, drop them and play the ones after.

    Episodes whose prompt was too long are not counted as failed here: `rollout.long_prompts` says what they are.
    `error/batches_dropped` counts the batches that were not used. Between tries is a `pause` of a second or more, for
    what failed may come back; None sleeps.

    Raises:
        DataError: too much failed `retries` + 1 times in a row.
    """
    for dropped in range(limits.retries + 1):
        rollout = play(next(tasks), key if dropped == 0 else jax.random.fold_in(key, dropped))
        failed = failed_episodes(rollout.rows)
        share = len(failed) / len({row.episode for row in rollout.rows})
        if share <= limits.max_failed:
            extra = {"error/batches_dropped": float(dropped)} if dropped else {}
            return Rollout(rollout.rows, rollout.metrics | extra)
        if dropped < limits.retries:
            (time.sleep if pause is None else pause)(PAUSE_S * 2**dropped)
    kinds = ", ".join(f"{name} {count}" for name, count in Counter(row.info["error"] for row in failed).most_common(4))
    raise DataError(
        f"rollout: too much failed {limits.retries + 1} times in a row, the last time {share:.0%} of the episodes "
        f"({kinds}; the first: {failed[0].info['error_text'] or 'no message'}), rollout.max_failed allows "
        f"{limits.max_failed:.0%}: mend the environment or the reward, or raise rollout.max_failed"
    )


def failed_episodes(rows: Sequence[Row]) -> list[Row]:
    """List the last row of each episode that failed, but for prompts over the limit."""
    last = {row.episode: row for row in rows}.values()
    return [row for row in last if row.ending == Ending.ERROR and row.info["error"] != LongPrompt.__name__]
