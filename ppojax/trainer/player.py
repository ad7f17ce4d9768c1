"""The episodes of each step: played when the step asks for them, or steps before, in a thread of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import jax
from grain import DatasetIterator

from ppojax.config import Config
from ppojax.models.forward import Params
from ppojax.models.lora import combine
from ppojax.rollout.dynamic import choose, count_varied
from ppojax.rollout.sync import sampler_params
from ppojax.trainer.build import SAMPLE, Parts, purpose_key
from ppojax.trainer.meter import Meter
from ppojax.trainer.playing import play_batch
from ppojax.types import Rollout

AGAIN = 2**16  # before the number of a round, apart from the tries of `play_batch`


class Played(NamedTuple):
    """A step's episodes."""

    rollout: Rollout
    tasks: dict[str, Any]  # where the stream of tasks stands behind them


class Player:
    """Plays the episodes of step after step.

    Those of step k, counted from 0, are drawn by the weights after max(k - n, 0) steps, n = `rollout.staleness`. With
    `mode=sync` they are played when the step asks for them. With `one_step_off` a thread begins them as soon as these
    weights are there, n steps before, and plays one step's after the other's. Weights, tasks, keys and their order are
    the same in both, so the rows are too: nothing depends on what is done first.
    """

    def __init__(self, config: Config, parts: Parts, stream: DatasetIterator) -> None:
        """Begin nothing yet."""
        rollout = config.rollout
        self._config, self._parts, self._stream = config, parts, stream
        self._ahead = rollout.staleness if rollout.mode == "one_step_off" else 0
        self.tasks: dict[str, Any] = stream.get_state()  # behind the episodes that were handed out last
        self._begun: dict[int, Future[Played]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._abandoned = Event()

    def __call__(self, number: int, weights: Sequence[Params], meter: Meter) -> Rollout:
        """Hand out the episodes of step `number`, and let those be begun whose weights are there.

        Args:
            number: steps done.
            weights: what is trained of the policy, as it was `staleness` steps ago, and after each step since.
            meter: of the step.

        Raises:
            DataError: see `play_batch`; what goes wrong in the thread is raised by the step whose episodes they are.
        """
        if not self._ahead:
            played = self._play(number, self._placed(weights[0], meter))
        else:
            last = max(number, min(number + self._ahead, self._config.steps - 1))
            for step in range(number, last + 1):
                if step not in self._begun:
                    self._begun[step] = self._begin(step, self._placed(weights[step - number], meter))
            with meter.timed("gen_wait"):
                played = self._begun[number].result()
            del self._begun[number]
        self.tasks = played.tasks
        return played.rollout

    def settle(self) -> None:
        """Wait until nothing is played, so that others may use the sampler and the environments."""
        wait(self._begun.values())

    def stop(self) -> None:
        """Give up what nobody has asked for, and end the thread; if it is asked for later, it is played from its start.

        The piece of work at hand is waited for: a call to a device, or to an environment if `rollout.workers=0`.
        """
        if self._thread is not None:
            self._abandoned.set()
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._begun, self._thread, self._abandoned = {}, None, Event()
        self._stream.set_state(self.tasks)

    def restore(self, tasks: dict[str, Any]) -> None:
        """Go on with the episodes behind this position of the stream."""
        self.stop()
        self.tasks = tasks
        self._stream.set_state(tasks)

    def _begin(self, number: int, params: Params) -> Future[Played]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="player")
        return self._thread.submit(self._play, number, params)

    def _placed(self, trained: Params, meter: Meter) -> Params:
        policy = combine(self._parts.actor_base, trained)
        with meter.timed("sync"):
            placed = jax.block_until_ready(sampler_params(policy, self._parts.collector.sampler.model))
        if placed is policy:
            meter.forget("sync")
        return placed

    def _play(self, number: int, params: Params) -> Played:
        """Play a step's episodes: more than one round of them, where groups have to differ."""
        start, settings, parts = time.perf_counter(), self._config.rollout, []
        play = partial(self._parts.collector, params, abandoned=self._abandoned)
        key = purpose_key(self._config.seed, number, SAMPLE)
        for attempt in range(settings.dynamic_rounds):
            again = key if attempt == 0 else jax.random.fold_in(key, AGAIN + attempt)
            parts.append(play_batch(play, self._stream, again, settings, self._abandoned.wait))
            if count_varied(parts) >= settings.prompts:
                break
        rollout = parts[0] if settings.dynamic_rounds == 1 else choose(parts, settings.prompts)
        version = max(number - settings.staleness, 0)
        rows = tuple(replace(row, version=version) for row in rollout.rows)
        metrics = rollout.metrics | {"timing_s/gen": time.perf_counter() - start}
        return Played(Rollout(rows, metrics), self._stream.get_state())
