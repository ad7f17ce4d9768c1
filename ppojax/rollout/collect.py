"""Episodes: the sampler and the environments take turns until every episode has ended.

Token in, token out: each row is one append-only buffer. What the policy wrote stays exactly as it was sampled;
an observation is rendered as the suffix that follows it and is never an action.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ppojax.envs import Env, EnvConfig, Step, Task
from ppojax.errors import DataError
from ppojax.models.forward import Params
from ppojax.models.tokenizer import Tokenizer
from ppojax.rollout.sampler import SamplerDef, Turn, decode, extend, pad_tokens, prefill, record_shapes
from ppojax.types import Ending, Messages, Recorded, Rollout, Row


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
    clipped: bool = False  # a turn ran into its limit
    info: dict[str, Any] = field(default_factory=dict)
    routed: np.ndarray | None = None  # of every token, when the sampler kept its choice of experts
    recorded: list[Recorded] = field(default_factory=lambda: [Recorded()])  # of the actions, turn by turn

    def write(self, ids: Sequence[int], *, action: bool, logp: Sequence[float] | None = None) -> None:
        """Append tokens to the row."""
        self.token += ids
        self.action += [action] * len(ids)
        self.logp += [0.0] * len(ids) if logp is None else logp
        self.reward += [0.0] * len(ids)

    def act(self, ids: list[int], logp: list[float], text: str) -> Messages:
        """Append a sampled turn, let the environment answer, and return its new messages (empty when it is over)."""
        self.write(ids, action=True, logp=logp)
        message = {"role": "assistant", "content": text}
        self.messages.append(message)
        try:
            return self._take(self.env.step(message))
        except Exception as error:  # an environment is user code: its failure ends its own episode only
            return self.fail(error)

    def _take(self, step: Step) -> Messages:
        if not math.isfinite(step.reward):
            raise ValueError(f"reward {step.reward}")
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
            clipped=self.clipped,
            messages=self.messages,
            info=self.info,
            routed=self.routed,
            recorded=jax.tree.map(lambda *turns: np.concatenate(turns), *self.recorded),
        )

    def close(self) -> None:
        """Let the environment go; the episode is over, so that a failure here changes nothing."""
        with suppress(Exception):
            self.env.close()


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
        episodes: list[Episode] = []
        try:
            for group, task in enumerate(tasks):
                self._reset(task, group, episodes)
            self._play(params, episodes, key)
        finally:
            for episode in episodes:
                episode.close()
        return self._rollout(episodes, time.perf_counter() - start)

    def _play(self, params: Params, episodes: Sequence[Episode], key: jax.Array) -> None:
        token_PT, length_P = pad_tokens(
            [e.token for e in episodes[:: self.group_size]], self.bucket, self.sampler.slots
        )
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
        if slots.routed_LBSK is not None:
            routed_BSLK = np.moveaxis(jax.device_get(slots.routed_LBSK), 0, 2)
            for episode, routed_SLK in zip(episodes, routed_BSLK, strict=True):
                episode.routed = routed_SLK[: len(episode.token)].copy()

    def prompt(self, task: Task, env: Env) -> tuple[Messages, list[int]]:
        """Start a task and render its prompt.

        Raises:
            DataError: the prompt leaves no room for a turn in the cache.
        """
        reset = env.reset(task)
        ids = self.tokenizer.render(reset.messages, reset.tools)
        if len(ids) >= self.sampler.slots:
            raise DataError(
                f"task {task.id}: its prompt has {len(ids)} tokens, rollout.max_tokens leaves room for "
                f"{self.sampler.slots - 1}: raise rollout.max_tokens or shorten the task"
            )
        return list(reset.messages), ids

    def _reset(self, task: Task, group: int, episodes: list[Episode]) -> None:
        """Start the episodes of one task; they share a prompt, which is read once."""
        shared: list[int] | None = None
        members = []
        nothing = jax.tree.map(lambda kept: np.zeros(kept.shape, kept.dtype), record_shapes(self.sampler, 0))
        for member in range(self.group_size):
            number = group * self.group_size + member
            episode = Episode(self.env.make(), group, number, [], [], recorded=[nothing])
            episodes.append(episode)
            members.append(episode)
            try:
                episode.messages, ids = self.prompt(task, episode.env)
            except DataError:
                raise
            except Exception as error:  # as in `Episode.act`
                episode.fail(error)
                continue
            if shared is not None and ids != shared:
                raise DataError(
                    f"task {task.id}: its environment starts the episodes of a group differently: "
                    f"make reset depend on the task alone, or set rollout.group_size=1"
                )
            shared = ids
        # A failed member keeps the group's prompt, so that rows stay aligned; it is in no loss.
        for episode in members:
            episode.write(shared or [self.tokenizer.eos_ids[0]], action=False)

    def _step(self, episodes: Sequence[Episode], turn: Turn) -> list[list[int]]:
        """Hand each active episode its turn; return the observation tokens to append, row by row."""
        observations: list[list[int]] = [[] for _ in episodes]
        for b, episode in enumerate(episodes):
            if episode.ending is not None:
                continue
            count = int(turn.count_B[b])
            ids, logp = turn.token_BN[b, :count].tolist(), turn.logp_BN[b, :count].tolist()
            episode.recorded.append(jax.tree.map(lambda kept, b=b, n=count: kept[b, :n].copy(), turn.recorded))
            ended = ids[-1] in self.tokenizer.eos_ids
            episode.clipped |= not turn.stopped_B[b]
            new = episode.act(ids, logp, self.tokenizer.decode(ids[:-1] if ended else ids))
            if episode.ending is not None:
                continue
            try:
                suffix = self.tokenizer.suffix(new, ended=ended)
            except DataError as error:  # what the environment said cannot be written in this vocabulary
                episode.fail(error)
                continue
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
