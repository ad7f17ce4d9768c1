"""Episodes: the sampler and the environments take turns until every episode has ended.

Token in, token out: each row is one append-only buffer. What the policy wrote stays exactly as it was sampled;
an observation is rendered as the suffix that follows it and is never an action.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ppojax.envs import Env, EnvConfig, Step, Task
from ppojax.errors import DataError
from ppojax.models.forward import Params
from ppojax.models.tokenizer import Tokenizer
from ppojax.rollout.sampler import SamplerDef, Turn, decode, extend, pad_tokens, prefill
from ppojax.types import Ending, Messages, Rollout, Row


@dataclass
class Episode:
    """One episode while it is played."""

    env: Env
    group: int
    number: int
    messages: Messages
    token: list[int]
    action: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    ending: Ending | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._append(self.token, action=False, logp=[0.0] * len(self.token))

    def _append(self, ids: Sequence[int], *, action: bool, logp: Sequence[float]) -> None:
        self.action += [action] * len(ids)
        self.logp += logp
        self.reward += [0.0] * len(ids)

    def write(self, ids: Sequence[int], *, action: bool, logp: Sequence[float] | None = None) -> None:
        """Append tokens to the row."""
        self.token += ids
        self._append(ids, action=action, logp=[0.0] * len(ids) if logp is None else logp)

    def act(self, ids: list[int], logp: list[float], text: str) -> Messages:
        """Append a sampled turn, let the environment answer, and return its new messages (empty when it is over)."""
        self.write(ids, action=True, logp=logp)
        message = {"role": "assistant", "content": text}
        self.messages.append(message)
        try:
            step = self.env.step(message)
        except Exception as error:  # an environment is user code: its failure ends its own episode only
            return self.fail(error)
        return self._take(step)

    def _take(self, step: Step) -> Messages:
        self.reward[-1] += step.reward
        self.info.update(step.info)
        self.messages += step.messages
        if step.terminated or step.truncated:
            self.ending = Ending.TERMINATED if step.terminated else Ending.TRUNCATED
            return []
        return step.messages

    def fail(self, error: Exception) -> Messages:
        """End the episode as an error, out of the loss and the group statistics."""
        self.ending = Ending.ERROR
        self.info["error"] = type(error).__name__
        return []

    def row(self) -> Row:
        """The finished row."""
        assert self.ending is not None
        return Row(
            token=np.array(self.token, np.int32),
            action=np.array(self.action, bool),
            logp_behavior=np.array(self.logp, np.float32),
            reward=np.array(self.reward, np.float32),
            group=self.group,
            episode=self.number,
            segment=0,
            ending=self.ending,
            messages=self.messages,
            info=self.info,
        )


@dataclass(frozen=True)
class Collector:
    """Plays episodes of one environment with one sampler."""

    env: EnvConfig
    tokenizer: Tokenizer
    sampler: SamplerDef
    stop_SV: jax.Array
    group_size: int
    bucket: int  # prompts and observations are padded up to a multiple of this

    def __call__(self, params: Params, tasks: Sequence[Task], key: jax.Array) -> Rollout:
        """Play `group_size` episodes of each task to their end.

        Raises:
            DataError: a prompt leaves no room for a turn in the cache.
        """
        start = time.perf_counter()
        episodes = self._reset(tasks)
        prompts = [e.token for e in episodes[:: self.group_size]]
        token_PT, length_P = pad_tokens(prompts, self.bucket, self.sampler.slots)
        slots = prefill(params, token_PT, length_P, sampler=self.sampler, group_size=self.group_size)
        episode_B = np.array([e.number for e in episodes], np.int32)
        turns = 0
        while (active_B := np.array([e.ending is None for e in episodes])).any():
            turn_key = jax.random.fold_in(key, turns)
            slots, turn = decode(params, slots, active_B, episode_B, turn_key, self.stop_SV, sampler=self.sampler)
            observations = self._step(episodes, jax.device_get(turn))
            turns += 1
            if any(observations):
                token_BT, count_B = pad_tokens(observations, self.bucket, self.sampler.slots)
                slots = extend(params, slots, token_BT, count_B, sampler=self.sampler)
        for episode in episodes:
            episode.env.close()
        return self._rollout(episodes, time.perf_counter() - start)

    def _reset(self, tasks: Sequence[Task]) -> list[Episode]:
        episodes = []
        for group, task in enumerate(tasks):
            for member in range(self.group_size):
                env = self.env.make()
                reset = env.reset(task)
                ids = self.tokenizer.render(reset.messages, reset.tools)
                if len(ids) >= self.sampler.slots:
                    raise DataError(
                        f"task {task.id}: its prompt has {len(ids)} tokens, rollout.max_tokens leaves room for "
                        f"{self.sampler.slots - 1}: raise rollout.max_tokens or shorten the task"
                    )
                number = group * self.group_size + member
                episodes.append(Episode(env, group, number, list(reset.messages), ids))
        return episodes

    def _step(self, episodes: Sequence[Episode], turn: Turn) -> list[list[int]]:
        """Hand each active episode its turn; return the observation tokens to append, row by row."""
        observations: list[list[int]] = [[] for _ in episodes]
        for b, episode in enumerate(episodes):
            if episode.ending is not None:
                continue
            count = int(turn.count_B[b])
            ids, logp = turn.token_BN[b, :count].tolist(), turn.logp_BN[b, :count].tolist()
            ended = ids[-1] in self.tokenizer.eos_ids
            new = episode.act(ids, logp, self.tokenizer.decode(ids[:-1] if ended else ids))
            if episode.ending is not None:
                continue
            suffix = self.tokenizer.suffix(new, ended=ended)
            if len(episode.token) + len(suffix) >= self.sampler.slots:
                episode.ending = Ending.TRUNCATED
                continue
            episode.write(suffix, action=False)
            observations[b] = suffix
        return observations

    def _rollout(self, episodes: Sequence[Episode], seconds: float) -> Rollout:
        errors = Counter(e.info["error"] for e in episodes if e.ending == Ending.ERROR)
        metrics = {f"error/{name}": float(count) for name, count in errors.items()}
        return Rollout(tuple(e.row() for e in episodes), {"timing_s/gen": seconds, **metrics})
