"""A tokenizer, policies and an environment of a few lines, for tests of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppojax.envs import Calculator, Env, Reset, Step, Task
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef, Params, init
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer import char_tokenizer
from ppojax.rollout.collect import Collector
from ppojax.rollout.sampler import SamplerDef
from ppojax.rollout.stop import stop_table

TOKENIZER = char_tokenizer("abcdefgh0123456789?!<>/ ")
VOCAB = TOKENIZER.vocab_size
MODEL = ModelDef(
    DecoderSpec(layers=2, width=32, heads=4, kv_heads=2, head_width=8, ffn=48, vocab=VOCAB, tied=False), remat="none"
)


def random_policy(seed: int = 0) -> Params:
    """Writes characters and special tokens at random, eos among them."""
    return init(MODEL, jax.random.key(seed))


def speaker(text: str) -> Params:
    """A policy that writes `text` (no character twice) and eos in every turn, whatever it was told.

    The blocks add nothing, so that a hidden state is its token's own embedding, and the head is a table of what
    follows what.
    """
    params = jax.tree.map(jnp.zeros_like, random_policy())
    params["norm"] = jnp.ones_like(params["norm"])
    params["embed"] = jnp.eye(VOCAB, MODEL.spec.width)
    ids = [*TOKENIZER.render([]), *TOKENIZER.encode(text), TOKENIZER.eos_ids[0]]
    for before, after in pairwise(ids):
        params["head"] = params["head"].at[after, before].set(8.0)
    return params


@dataclass
class ScriptedEnv:
    """Answers each turn with the task's next observation and reward; raises where the reward is an exception."""

    seen: list[str] = field(default_factory=list)
    closed: bool = False

    def reset(self, task: Task) -> Reset:
        self.task = task
        return Reset([{"role": "user", "content": task.data["prompt"]}])

    def step(self, message: dict[str, Any]) -> Step:
        turn = len(self.seen)
        self.seen.append(message["content"])
        observation, reward = self.task.data["turns"][turn]
        if isinstance(reward, Exception):
            raise reward
        last = turn + 1 == len(self.task.data["turns"])
        messages = [] if last else [{"role": "tool", "content": observation}]
        return Step(
            messages, reward, terminated=last and observation != "cut", truncated=last, info={"turns": turn + 1}
        )

    def close(self) -> None:
        self.closed = True


class Scripted(Calculator):
    """An environment config whose episodes follow their tasks' scripts."""

    def make(self) -> Env:
        """Make an environment for one episode."""
        return ScriptedEnv()


def scripted_task(prompt: str, *turns: tuple[str, float | Exception]) -> Task:
    """A task whose turns are answered with (observation, reward); the last observation is not shown."""
    return Task(prompt, {"prompt": prompt, "turns": turns})


def sampler_of(**changes: Any) -> SamplerDef:
    settings: dict[str, Any] = {"mesh": MeshConfig().build(), "positions": 64, "turn_tokens": 6} | changes
    return SamplerDef(MODEL, **settings)


def stops(stop: Sequence[str] = (), eos: Sequence[int] = TOKENIZER.eos_ids) -> jax.Array:
    return jnp.asarray(stop_table(TOKENIZER.token_bytes(), stop, eos))


def collector_of(
    group_size: int = 2, stop: Sequence[str] = (), slots: int = 6, workers: int = 0, **changes: Any
) -> Collector:
    """A collector of scripted episodes."""
    return Collector(Scripted(), TOKENIZER, sampler_of(**changes), stops(stop), group_size, 8, slots, workers)


def bits(x: Any) -> np.ndarray:
    """A float32 array as integers, so that equality is of bits."""
    return np.asarray(x, np.float32).view(np.uint32)
