"""The programs of a training step, lowered for a mesh whose devices need not exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppojax.config import Config
from ppojax.experience.batch import without_records
from ppojax.experience.score import Scorers, score
from ppojax.mesh import row_shards
from ppojax.models.forward import Heads, ModelDef, Params
from ppojax.models.lora import combine
from ppojax.models.perturb import apart
from ppojax.planning.abstract import (
    abstract_batch,
    abstract_experience,
    abstract_frozen,
    abstract_played,
    abstract_slots,
    abstract_state,
    by_rows,
    scored,
    shape,
)
from ppojax.planning.models import Models
from ppojax.planning.workload import Workload, passes_of
from ppojax.rollout.decode import decode, no_turns
from ppojax.rollout.feed import FEW, PAIRS, heights, widths
from ppojax.rollout.sampler import SamplerDef, Slots, extend, prefill, share
from ppojax.trainer.build import make_sampler
from ppojax.types import Experience, TrainState
from ppojax.update.actor import actor_step
from ppojax.update.critic import critic_step

STOP_STATES = 16  # rows of the table of stop strings, about


class Step(NamedTuple):
    """One program.

    Attributes:
        mesh: that it is lowered for.
        calls: of it in a training step, of whole batches.
        inputs: those of its arguments that nothing else holds.
    """

    name: str
    mesh: jax.sharding.Mesh
    calls: float
    lower: Callable[[], Any]
    inputs: Any


class Held(NamedTuple):
    """What lies on the devices all the time, and the sampler's copy of the policy, where it is one."""

    actor: TrainState
    critic: TrainState | None
    frozen: tuple[Params, Params]  # beside the policy's adapters, and beside the critics'
    reference: Params | None
    older: tuple[Params, ...]
    played: Params | None


class Plan(NamedTuple):
    """The programs of a training step, and what is held beside them."""

    steps: tuple[Step, ...]
    held: Held
    slots: Slots


def plan_steps(
    config: Config, models: Models, mesh: jax.sharding.Mesh, work: Workload, beside: jax.sharding.Mesh | None = None
) -> Plan:
    """Describe the programs of a run on a mesh.

    Args:
        config: of the run.
        models: without custom calls that only the device's own libraries can compile.
        mesh: of the trainer.
        work: shapes of a step.
        beside: the sampler's mesh, where it has devices of its own.
    """
    actor = replace(models.actor, mesh=mesh)
    critic, theirs = models.critic, config.critic.mesh
    if critic is not None:
        critic = replace(critic, mesh=mesh if theirs is None else theirs.rearrange(mesh))
    base_dtype = config.model.base_dtype
    optimizers = config.actor.optimizer, config.critic.optimizer
    state = abstract_state(
        *(actor, config.actor.build_optimizer()),
        spread=optimizers[0].over_data,
        noise=config.actor.perturb is not None,
    )
    weights = apart(state.params)[0]
    frozen = abstract_frozen(actor, base_dtype)
    policy = combine(frozen, weights)
    shared = config.rollout.model_copy(update={"devices": "shared"})
    sampler = make_sampler(config.model_copy(update={"rollout": shared}), actor, mesh if beside is None else beside)
    played = abstract_played(sampler, policy)
    slots = abstract_slots(sampler, played, work.slots)
    critics = None
    if critic is not None:
        critics = abstract_state(critic, config.critic.build_optimizer(), spread=optimizers[1].over_data)
    held = Held(
        state,
        critics,
        (frozen, {} if critic is None else abstract_frozen(critic, base_dtype)),
        weights if config.needs & {"logp_ref", "hidden_ref"} else None,
        (weights,) * config.rollout.staleness,
        None if _same(played, policy) else played,
    )
    make = _Maker(config, actor, critic, sampler, work, held)
    sampling = make.sampling(played, slots)
    return Plan((*sampling, *make.scoring(), *make.updates()), held, slots)


def _same(a: Params, b: Params) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, len(x.shape)) for x, y in pairs)


class _Maker(NamedTuple):
    config: Config
    actor: ModelDef
    critic: ModelDef | None
    sampler: SamplerDef
    work: Workload
    held: Held

    def sampling(self, played: Params, slots: Slots) -> list[Step]:
        """Reading prompts, handing them on in a group, reading behind a cache where that happens, and decoding."""
        config, sampler = self.config.rollout, self.sampler
        count, key = self.work.slots, jax.eval_shape(lambda: jax.random.key(0))
        turns = jax.tree.map(lambda x: shape(x.shape, x.dtype), no_turns(count))
        stop_SV = shape((STOP_STATES, sampler.model.spec.vocab), jnp.int32)

        def rows_of(past: int) -> tuple[int, Any]:
            rows = _rows(count, width, sampler, past)
            return rows, (shape((rows, width), jnp.int32), shape((rows,), jnp.int32), shape((rows,), jnp.int32))

        work, chunks = self.work, widths(self.work.prompt, config.prompt_bucket)
        width, steps = max(chunks), []
        rows, read = rows_of(0)
        lower = partial(prefill.lower, played, slots, *read, sampler=sampler)
        steps.append(Step("prefill", sampler.mesh, config.prompts / rows, lower, (slots, read)))
        if config.group_size > 1:
            number = shape((count,), jnp.int32)
            lower = partial(share.lower, slots, number, number, number, sampler=sampler)
            steps.append(Step("share", sampler.mesh, work.rows / count, lower, (slots, number)))
        if self.config.env.max_turns > 1 or len(chunks) > 1:
            rows, read = rows_of(sampler.positions)
            lower = partial(extend.lower, played, slots, *read, sampler=sampler, whole=rows == count)
            more = config.prompts * (len(chunks) - 1) + work.rows * (work.tokens - work.prompt - work.written) / width
            steps.append(Step("extend", sampler.mesh, more / rows, lower, (slots, read)))
        lower = partial(decode.lower, played, slots, turns, key, stop_SV, sampler=sampler)
        calls = passes_of(work) / config.segment
        steps.append(Step("decode", sampler.mesh, calls, lower, (slots, turns, stop_SV)))
        return steps

    def scoring(self) -> list[Step]:
        """The pass before the update, where anything is scored."""
        config, held = self.config, self.held
        scorers = Scorers(
            old=self._whole(apart(held.actor.params)[0]) if "logp_old" in config.needs else None,
            reference=None if held.reference is None else self._whole(held.reference),
            critic=None if held.critic is None else combine(held.frozen[1], held.critic.params),
        )
        rows = without_records(abstract_experience(config, self.sampler, self.work, self.work.rows))
        beside = self.critic is not None and self.critic.mesh != self._mesh
        asked = [("score", self._mesh, scorers._replace(critic=None) if beside else scorers)]
        if beside and self.critic is not None and self.critic.mesh is not None:
            asked.append(("values", self.critic.mesh, Scorers(critic=scorers.critic)))
        return [self._score(*each, rows) for each in asked if any(part is not None for part in each[2])]

    def _score(self, name: str, mesh: jax.sharding.Mesh, scorers: Scorers, rows: Experience) -> Step:
        """One pass over the rows on a mesh. Where critics have their own, they are read there alone."""
        config, alone = self.config, name == "values"
        run = partial(
            score,
            actor=replace(self.actor, mesh=mesh),
            critic=self.critic if scorers.critic is not None else None,
            layout=self.work.layout,
            temperature=config.rollout.temperature,
            microbatch_rows=config.update.microbatch_rows,
            logp_ref="logp_ref" in config.needs and not alone,
            hidden_ref="hidden_ref" in config.needs and not alone,
        )
        placed = by_rows(rows, mesh)
        return Step(name, mesh, 1.0, partial(jax.jit(run).lower, scorers, placed), placed)

    def updates(self) -> list[Step]:
        """One optimizer step of the critics, and one of the policy."""
        config, held, work = self.config, self.held, self.work
        rows = abstract_experience(config, self.sampler, work, work.rows // config.update.minibatches)
        batch = by_rows(abstract_batch(config, scored(config, self.actor, rows)), self._mesh)
        shared = {"layout": work.layout, "microbatch_rows": config.update.microbatch_rows}
        key = jax.eval_shape(lambda: jax.random.key(0))
        steps, count = [], float(config.update.epochs * config.update.minibatches)
        if self.critic is not None:
            assert self.critic.mesh is not None
            light = by_rows(batch._replace(experience=without_records(batch.experience)), self.critic.mesh)
            lower = partial(
                critic_step.lower,
                *(held.critic, light),
                model=self.critic,
                config=config.critic,
                mesh=self.critic.mesh,
                frozen=held.frozen[1],
                key=key if self.critic.lora is not None and self.critic.lora.dropout else None,
                **shared,
            )
            steps.append(Step("critic", self.critic.mesh, count * config.critic.updates, lower, light))
        heads, perturb = self._heads(), config.actor.perturb
        lower = partial(
            actor_step.lower,
            *(held.actor, batch),
            model=self.actor,
            loss=config.loss,
            optimizer=config.actor.optimizer,
            temperature=config.rollout.temperature,
            router=config.actor.router,
            mesh=self._mesh,
            frozen=held.frozen[0],
            key=key if self.actor.lora is not None and self.actor.lora.dropout else None,
            heads=heads,
            perturb=perturb,
            noise_key=None if perturb is None else key,
            **shared,
        )
        return [*steps, Step("actor", self._mesh, count, lower, (batch, heads))]

    @property
    def _mesh(self) -> jax.sharding.Mesh:
        assert self.actor.mesh is not None
        return self.actor.mesh

    def _whole(self, trained: Params) -> Params:
        return combine(self.held.frozen[0], trained)

    def _heads(self) -> Heads:
        """As `Trainer` makes them: of the sampler, and of the reference policy."""
        params = self._whole(apart(self.held.actor.params)[0])
        head = params["head"] if "head" in params else params["embed"]

        def cast(dtype: str) -> Any:
            return shape(head.shape, dtype, head.sharding)

        return Heads(
            cast(self.sampler.model.dtype) if self.config.records.hidden else None,
            cast(self.actor.dtype) if "hidden_ref" in self.config.needs else None,
        )


def _rows(slots: int, width: int, sampler: SamplerDef, past: int) -> int:
    """Rows that `ppojax.rollout.feed` reads at once when every slot has something to read."""
    if slots * width <= FEW:
        return slots
    unit = row_shards(sampler.mesh)
    most = max(PAIRS // (width * (width + past)) // unit, 1) * unit
    return max(heights(slots, min(slots, most), unit))
