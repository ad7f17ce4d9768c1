"""One training step, in the order in which data flows through it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from ppojax.config import Config
from ppojax.errors import DataError, DivergedError
from ppojax.experience.batch import make_batch, without_records
from ppojax.experience.minibatch import minibatches
from ppojax.experience.pack import lay_out, pack, row_bucket
from ppojax.experience.score import Scorers, score
from ppojax.experience.summary import advantage_metrics, rollout_metrics
from ppojax.models.flops import experience_flops, peak_flops
from ppojax.models.forward import Heads, Params, head_VD
from ppojax.models.lora import combine, fingerprint, merge
from ppojax.models.pretrained import Loaded
from ppojax.models.settings import CutCritic
from ppojax.rollout.sync import sampler_params
from ppojax.rollout.tasks import task_stream
from ppojax.runtime.compiling import compile_metrics
from ppojax.trainer.build import DROP_ACTOR, DROP_CRITIC, SAMPLE, States, build, build_critic, dropout_key, purpose_key
from ppojax.trainer.playing import play_batch
from ppojax.trainer.warm_start import warm_start
from ppojax.types import Batch, Experience, Layout, Rollout, Row
from ppojax.update.actor import actor_step
from ppojax.update.critic import critic_step
from ppojax.update.state import skipped_in_a_row


@dataclass(frozen=True)
class StepOut:
    """What one step saw and did."""

    step: int
    metrics: dict[str, float]
    rollout: Rollout
    batch: Batch
    rows: Sequence[Row | None]  # of the rollout, where they stand in the batch


class Trainer:
    """A run that is advanced one step at a time.

    ```python
    trainer = Trainer(Config.load("config=configs/tiny.yaml"))
    while trainer.number < 10:
        print(trainer.step().metrics["reward/mean"])
    ```
    """

    def __init__(self, config: Config) -> None:
        """Load models and tasks; train nothing yet.

        Raises:
            ConfigError, DataError: see `ppojax.trainer.build.build`.
        """
        self.config = config
        self.parts, self.states = build(config)
        self.stream = task_stream(self.parts.train_tasks, config.rollout.prompts, config.seed)
        self.number = 0  # steps done
        self.reference = self._copy_of_actor()
        self.older = self._copies_to_play()
        self._seconds: dict[str, float] = {}

    def warm_start(self) -> list[float]:
        """Do the supervised steps that the config asks for, if any; return their losses."""
        settings = self.config.warm_start
        if settings is None:
            return []
        self.states.actor, losses = warm_start(self.config, settings, self.parts, self.states.actor)
        # What was taken from the actor is taken again, from the policy that training starts with.
        self.reference = self._copy_of_actor()
        self.older = self._copies_to_play()
        if self.parts.critic is not None and isinstance(self.config.critic.model, CutCritic):
            warm = Loaded(self.parts.actor, self.policy(), self.parts.tokenizer)
            _, _, self.states.critic = build_critic(self.config, warm, self.parts.mesh)
        return losses

    def step(self) -> StepOut:
        """Sample, score, estimate advantages, update the critic, then the actor.

        Raises:
            DivergedError: too many updates in a row had gradients that are not finite.
            DataError: a prompt is too long, or too many episodes fail (see `play_batch`).
        """
        config, parts, states = self.config, self.parts, self.states
        self._seconds = {}
        start = time.perf_counter()
        key = purpose_key(config.seed, self.number, SAMPLE)

        played = self._sync()
        with self._timed("gen"):
            rollout = play_batch(partial(parts.collector, played), self.stream, key, config.rollout)
        heads = self._heads(played)
        del played  # where it is a copy, it is not needed in the update
        group = config.rollout.group_size if config.update.shared_prefix else 1
        buckets = {"prompt_bucket": config.rollout.prompt_bucket, "bucket": config.rollout.bucket}
        rows, layout = lay_out(rollout.rows, group=group, **buckets)
        experience = pack(
            rows,
            batch=row_bucket(len(rows), config.rollout.rows),
            bucket=config.rollout.bucket,
            actions=config.env.max_turns * config.rollout.max_turn_tokens + config.rollout.written,
            mesh=parts.mesh,
            layout=layout,
        )
        with self._timed("values"):
            experience = jax.block_until_ready(
                score(
                    self._scorers(),
                    experience,
                    actor=parts.actor,
                    critic=parts.critic,
                    layout=layout,
                    temperature=config.rollout.temperature,
                    microbatch_rows=config.update.microbatch_rows,
                    hidden_ref="hidden_ref" in config.loss.needs,
                )
            )
        batch = make_batch(experience, estimator=config.advantage)
        metrics = rollout_metrics(rollout.rows) | rollout.metrics | advantage_metrics(batch, config.advantage.gamma)
        if states.critic is not None:
            with self._timed("update_critic"):
                metrics |= self._update_critic(batch, layout)
        if states.critic is None or self.number >= config.critic.warmup_steps:
            with self._timed("update_actor"):
                metrics |= self._update_actor(batch, layout, heads)
        self.number += 1
        metrics |= self._performance(rollout, time.perf_counter() - start) | compile_metrics()
        metrics |= self._utilisation(experience, layout)
        # A caller may keep this over the next step: without the arrays that are large on the devices.
        batch = batch._replace(experience=without_records(batch.experience))
        return StepOut(self.number, metrics, rollout, batch, rows)

    def policy(self) -> Params:
        """The actor's parameters, all of them."""
        return combine(self.parts.actor_base, self.states.actor.params)

    def sampler_policy(self) -> Params:
        """The actor's parameters as the sampler reads them (see `sampler_params`)."""
        return sampler_params(self.policy(), self.parts.collector.sampler.model)

    def merged_policy(self) -> Params:
        """The actor's parameters with its adapters folded in, float32."""
        lora = self.parts.actor.lora
        return self.policy() if lora is None else merge(self.policy(), lora, "float32")

    def state(self) -> dict[str, Any]:
        """The arrays that a checkpoint holds."""
        whole = {"actor": self.states.actor, "critic": self.states.critic, "reference": self.reference}
        return whole | {"older": self.older}

    def position(self) -> dict[str, Any]:
        """The rest of what a checkpoint holds, as JSON: randomness needs only the seed and the step."""
        return {"step": self.number, "tasks": self.stream.get_state(), **self._identity()}

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.config.seed, "tokenizer": self.parts.tokenizer.fingerprint(), **self._bases}

    @cached_property
    def _bases(self) -> dict[str, str]:
        """What says which frozen weights the adapters belong to, for they are in no checkpoint."""
        bases = {"model": self.parts.actor_base, "critic.model": self.parts.critic_base}
        return {f"frozen weights of {name}": fingerprint(base) for name, base in bases.items() if base}

    def restore(self, state: dict[str, Any], position: dict[str, Any]) -> None:
        """Go back to where `state()` and `position()` were taken.

        Raises:
            DataError: they were taken with another seed, another tokenizer or other frozen weights.
        """
        for name, here in self._identity().items():
            if position.get(name) != here:
                raise DataError(
                    f"resume: the checkpoint was written with {name} {position.get(name)}, this run has {here}: "
                    f"use the same {name}, or start another run.name"
                )
        self.states = States(state["actor"], state["critic"])
        self.reference, self.older = state["reference"], state["older"]
        self.number = position["step"]
        self.stream.set_state(position["tasks"])

    def _copy_of_actor(self) -> Params | None:
        if not self.config.loss.needs & {"logp_ref", "hidden_ref"}:
            return None
        return self._copy()

    def _copy(self) -> Params:
        return jax.tree.map(lambda p: p.copy(), self.states.actor.params)

    def _copies_to_play(self) -> list[Params]:
        """What the actor was in the steps before, oldest first, as far as stale weights are played: itself, so far."""
        stale = self.config.rollout.mismatch.stale_steps
        return [self._copy()] * stale if stale else []

    def _scorers(self) -> Scorers:
        base, critic = self.parts.actor_base, self.states.critic
        return Scorers(
            old=self.policy() if "logp_old" in self.config.loss.needs else None,
            reference=None if self.reference is None else combine(base, self.reference),
            critic=None if critic is None else combine(self.parts.critic_base, critic.params),
        )

    def _sync(self) -> Params:
        """The parameters that this step is played with."""
        policy = self.policy()
        if self.older:
            policy = combine(self.parts.actor_base, self.older[0])
            self.older = [*self.older[1:], self._copy()]
        with self._timed("sync"):
            played = jax.block_until_ready(sampler_params(policy, self.parts.collector.sampler.model))
        if played is policy:
            del self._seconds["sync"]
        return played

    def _heads(self, played: Params) -> Heads:
        """The heads of the policies that the loss compares with; the update takes the actor's own arrays over."""
        loss, head, own = self.config.loss, head_VD(played), head_VD(self.policy())
        behavior = reference = None
        if self.config.records.hidden:
            cast = head.astype(self.parts.collector.sampler.model.dtype)
            behavior = cast.copy() if cast is own else jax.device_put(cast, own.sharding)
        if "hidden_ref" in loss.needs:
            assert self.reference is not None
            reference = head_VD(combine(self.parts.actor_base, self.reference)).astype(self.parts.actor.dtype)
        return Heads(behavior, reference)

    def _update_critic(self, batch: Batch, layout: Layout) -> dict[str, float]:
        config, parts, done = self.config, self.parts, []
        batch = batch._replace(experience=without_records(batch.experience))
        assert parts.critic is not None
        for epoch in range(config.update.epochs * config.critic.updates):
            for minibatch in minibatches(
                batch, config.update.minibatches, (config.seed, self.number, epoch, 1), layout.group, parts.mesh
            ):
                assert self.states.critic is not None
                self.states.critic, metrics = critic_step(
                    self.states.critic,
                    minibatch,
                    model=parts.critic,
                    config=config.critic,
                    layout=layout,
                    microbatch_rows=config.update.microbatch_rows,
                    mesh=parts.mesh,
                    frozen=parts.critic_base,
                    key=dropout_key(parts.critic, config.seed, self.number, DROP_CRITIC, len(done)),
                )
                done.append(metrics)
        assert self.states.critic is not None
        self._check_finite("critic", skipped_in_a_row(self.states.critic))
        return _average(done)

    def _update_actor(self, batch: Batch, layout: Layout, heads: Heads) -> dict[str, float]:
        config, parts, done = self.config, self.parts, []
        for epoch in range(config.update.epochs):
            for minibatch in minibatches(
                batch, config.update.minibatches, (config.seed, self.number, epoch, 0), layout.group, parts.mesh
            ):
                self.states.actor, metrics = actor_step(
                    self.states.actor,
                    minibatch,
                    model=parts.actor,
                    loss=config.loss,
                    optimizer=config.actor.optimizer,
                    temperature=config.rollout.temperature,
                    layout=layout,
                    microbatch_rows=config.update.microbatch_rows,
                    mesh=parts.mesh,
                    router=config.actor.router,
                    frozen=parts.actor_base,
                    key=dropout_key(parts.actor, config.seed, self.number, DROP_ACTOR, len(done)),
                    heads=heads,
                )
                done.append(metrics)
        self._check_finite("actor", skipped_in_a_row(self.states.actor))
        # Only before the first update is the gap to the sampler numerical; afterwards it is learning.
        first = {name: float(v) for name, v in done[0].items() if name.startswith("sampling/")}
        return _average(done) | first

    def _check_finite(self, who: str, in_a_row: int) -> None:
        if in_a_row >= self.config.update.max_skipped:
            raise DivergedError(
                f"{who}: gradients were not finite in {in_a_row} updates in a row (update.max_skipped): "
                f"lower {who}.optimizer.learning_rate or look at the last transcripts"
            )

    def _performance(self, rollout: Rollout, seconds: float) -> dict[str, float]:
        tokens = sum(len(row.token) for row in rollout.rows)
        timing = {f"timing_s/{name}": value for name, value in self._seconds.items()}
        return timing | {
            "timing_s/step": seconds,
            "perf/time_per_step": seconds,
            "perf/total_num_tokens": float(tokens),
            "perf/throughput": tokens / seconds / self.parts.mesh.size,
        }

    def _utilisation(self, experience: Experience, layout: Layout) -> dict[str, float]:
        """Arithmetic of the actor's update over its time, and over the peak of the devices where that is known."""
        seconds = self._seconds.get("update_actor")
        if not seconds:
            return {}
        flops = self.config.update.epochs * experience_flops(self.parts.actor.spec, experience, layout)
        rate, peak = flops / seconds / self.parts.mesh.size, peak_flops(self.parts.mesh.devices.flat[0].device_kind)
        done = {"perf/actor_tflops": rate / 1e12}
        return done if peak is None else done | {"perf/mfu": rate / peak}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - start


def _average(steps: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over the optimizer steps of one training step; maxima for names that end in `_max`."""
    host = jax.device_get(steps)
    return {
        name: float(np.max([m[name] for m in host]) if name.endswith("_max") else np.mean([m[name] for m in host]))
        for name in host[0]
    }
