"""Demonstrations: episodes played by an environment's own expert, as rows for supervised steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppojax.envs import EnvConfig, Task
from ppojax.models.tokenizer import Tokenizer
from ppojax.rollout.episode import Episode
from ppojax.types import Ending, Row


def demonstrate(
    env: EnvConfig, tokenizer: Tokenizer, tasks: Sequence[Task], *, wrong: float, rng: np.random.Generator
) -> list[Row]:
    """Let the expert play one episode of each task.

    A share `wrong` of the turns is what the expert would have said to another task, so that a warm start can end
    at a policy that is right only some of the time.
    """
    return [
        _play(env, tokenizer, tasks, number, rng.random(env.max_turns) < wrong, int(rng.integers(len(tasks))))
        for number in range(len(tasks))
    ]


def _play(
    env_config: EnvConfig, tokenizer: Tokenizer, tasks: Sequence[Task], number: int, wrong: np.ndarray, other: int
) -> Row:
    env, task = env_config.make(), tasks[number]
    reset = env.reset(task)
    episode = Episode(env, number, number, list(reset.messages), [])
    episode.write(tokenizer.render(reset.messages, reset.tools), action=False)
    for turn in range(env_config.max_turns):
        text = env_config.expert(episode.messages, tasks[other] if wrong[turn] else task)
        stopped = text.endswith(env_config.stop)
        ids = tokenizer.encode(text)
        if not stopped and ids[-1:] not in ([i] for i in tokenizer.eos_ids):
            ids.append(tokenizer.eos_ids[0])
        new = episode.act(ids, [0.0] * len(ids), text)
        if episode.ending is not None:
            break
        episode.write(tokenizer.suffix(new, ended=not stopped), action=False)
    else:
        episode.ending = Ending.TRUNCATED
    episode.close()
    return episode.rows()[0]
