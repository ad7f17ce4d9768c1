"""Assemble the parts of a run from its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from ppojax.compilation_cache import enable_compilation_cache
from ppojax.config import Config
from ppojax.config.meshes import undivided
from ppojax.envs import Task
from ppojax.errors import ConfigError, DataError
from ppojax.kernels.dispatch import choose, platform_of
from ppojax.mesh import own_part, replicated, row_shards
from ppojax.models.critic_source import CriticForm, load_critic
from ppojax.models.forward import ModelDef, Params
from ppojax.models.lora import split
from ppojax.models.perturb import NAME, Perturb
from ppojax.models.pretrained import Loaded, load_model
from ppojax.models.tokenizer import Tokenizer
from ppojax.rollout.check import check_tasks
from ppojax.rollout.collect import Collector
from ppojax.rollout.compaction import Compactor
from ppojax.rollout.draw import Cuts
from ppojax.rollout.exact import Judge
from ppojax.rollout.prompts import PromptLimit
from ppojax.rollout.sampler import SamplerDef
from ppojax.rollout.stop import stop_table
from ppojax.runtime.allocator import keep_freed_memory
from ppojax.types import NO_RECORDS, TrainState
from ppojax.update.offload import check_host_memory, rest
from ppojax.update.state import init_state, place_frozen

# Purposes of randomness, and the "step" of what happens outside of steps.
INIT_ACTOR, INIT_CRITIC, SAMPLE, EVALUATE, DROP_ACTOR, DROP_CRITIC, PERTURB = range(7)
OUTSIDE = 2**31 - 1
CHECKED_PROMPTS = 8


def purpose_key(seed: int, step: int, purpose: int) -> jax.Array:
    """The key of one purpose in one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def dropout_key(model: ModelDef, seed: int, step: int, purpose: int, update: int) -> jax.Array | None:
    """The key of one update whose adapters drop inputs; None where they do not."""
    if model.lora is None or model.lora.dropout == 0:
        return None
    return jax.random.fold_in(purpose_key(seed, step, purpose), update)


def noise_key(perturb: Perturb | None, seed: int, step: int, update: int) -> jax.Array | None:
    """The key of one update whose blocks read noise; None where they do not."""
    return None if perturb is None else jax.random.fold_in(purpose_key(seed, step, PERTURB), update)


@dataclass(frozen=True)
class Parts:
    """All that a run is made of, apart from its state."""

    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    actor: ModelDef
    critic: ModelDef | None
    collector: Collector
    train_tasks: Sequence[Task]
    eval_tasks: Sequence[Task]
    actor_base: Params  # frozen weights beside adapters; nothing where everything is trained
    critic_base: Params

    @property
    def devices(self) -> int:
        """Devices of the trainer and the sampler."""
        return len({*self.mesh.devices.flat, *self.collector.sampler.mesh.devices.flat})

    @property
    def critic_mesh(self) -> jax.sharding.Mesh:
        """Where the critics are read and trained: the devices of `mesh`, perhaps in another order of axes."""
        assert self.critic is not None and self.critic.mesh is not None
        return self.critic.mesh


@dataclass
class States:
    """What training changes."""

    actor: TrainState
    critic: TrainState | None


def build(config: Config) -> tuple[Parts, States]:
    """Load models, place them on the mesh, and set up sampling.

    Raises:
        ConfigError: the mesh has too many devices or does not divide the model, the environment lacks what it needs, or
            several processes cannot do what is asked for.
        DataError: weights, tokenizer or tasks cannot be used, a prompt is too long, or no episode can be started.
        CannotWriteError: the folder named for compiled programs cannot be written.
    """
    config.rollout.check_processes(jax.process_count())
    enable_compilation_cache(config.run.compilation_cache)
    if config.run.keep_memory:
        keep_freed_memory()  # before the first device is asked for: its threads make heaps of their own
    train_tasks, eval_tasks = _tasks(config)  # what cannot be used there should not wait for weights
    mesh = config.mesh.build()
    config.rollout.build_mesh(mesh)
    key = purpose_key(config.seed, OUTSIDE, INIT_ACTOR)
    loaded = load_model(config.model, key, mesh, lambda model: _check_actor(config, model))
    loaded = replace(loaded, model=replace(loaded.model, mesh=mesh))
    _check_actor(config, loaded.model)
    _check_statistics(config, loaded.model)
    trained, frozen = split(loaded.params, loaded.model.lora)
    critic, critic_base, critic_state = None, {}, None
    if config.advantage.needs_values:
        critic, critic_base, critic_state = build_critic(config, loaded, mesh)
    actor_base = place_frozen(loaded.model, frozen, mesh)
    # Last, for it takes the weights over: a critic may be cut from them, and its frozen ones are the actor's own.
    perturb = config.actor.perturb
    if perturb is not None:
        perturb.check(loaded.model.spec)
        trained = {**trained, NAME: perturb.start(loaded.model.spec)}
    check_host_memory(config.actor.offload, "actor.offload", mesh)
    optimizer, spread = config.actor.build_optimizer(), config.actor.optimizer.over_data
    actor = init_state(loaded.model, trained, optimizer, mesh, donate=not critic_base, spread=spread)
    states = States(rest(actor, config.actor.offload), critic_state)
    parts = Parts(
        mesh,
        loaded.tokenizer,
        loaded.model,
        critic,
        make_collector(config, loaded.model, loaded.tokenizer, mesh),
        train_tasks,
        eval_tasks,
        actor_base,
        critic_base,
    )
    for tasks in (parts.train_tasks, parts.eval_tasks):
        check_tasks(parts.collector, tasks[:CHECKED_PROMPTS])
    return parts, states


def _tasks(config: Config) -> tuple[Sequence[Task], Sequence[Task]]:
    train = config.env.tasks("train", config.seed)
    if len(train) < config.rollout.prompts:
        raise DataError(f"env: {len(train)} training tasks, rollout.prompts asks for {config.rollout.prompts}")
    return train, config.env.tasks("eval", config.seed)[: config.eval.prompts]


def build_critic(config: Config, actor: Loaded, mesh: jax.sharding.Mesh) -> tuple[ModelDef, Params, TrainState]:
    """Make the critics on their mesh (`mesh` is the actor's), place what is frozen, and start their optimizer."""
    settings = config.critic
    mesh = mesh if settings.mesh is None else settings.mesh.rearrange(mesh)
    key = purpose_key(config.seed, OUTSIDE, INIT_CRITIC)
    form = CriticForm(settings.head, settings.count, settings.noise, settings.lora, config.model.base_dtype)
    critic, params = load_critic(settings.model, actor, key, form)
    critic = replace(critic, mesh=mesh)
    _check_mesh(config, critic)
    trained, frozen = split(params, critic.lora)
    check_host_memory(settings.offload, "critic.offload", mesh)
    optimizer, spread = settings.build_optimizer(), settings.optimizer.over_data
    state = rest(init_state(critic, trained, optimizer, mesh, spread=spread), settings.offload)
    return critic, place_frozen(critic, frozen, mesh), state


def make_sampler(config: Config, model: ModelDef, mesh: jax.sharding.Mesh) -> SamplerDef:
    """Set up the sampler, on its own mesh and in its own compute type."""
    rollout = config.rollout
    mesh = own_part(rollout.build_mesh(mesh))
    # One position stays free for the value of the state after a row's last token.
    return SamplerDef(
        replace(model, remat="none", dtype=rollout.dtype or model.dtype, mesh=mesh),
        mesh,
        rollout.max_tokens - 1,
        rollout.max_turn_tokens,
        rollout.segment,
        rollout.temperature,
        Cuts(rollout.top_k, rollout.top_p, rollout.min_p),
        record_experts=rollout.record_experts is not False and model.spec.moe is not None,
        records=config.records,
        logit_noise=rollout.mismatch.logit_noise,
        hidden_noise=rollout.mismatch.hidden_noise,
        int8_cache=rollout.mismatch.cache == "int8",
    )


def make_collector(config: Config, model: ModelDef, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Collector:
    """Set up the sampler and the episodes."""
    rollout, sampler = config.rollout, make_sampler(config, model, mesh)
    table = stop_table(tokenizer.token_bytes(), config.env.stop, tokenizer.eos_ids)
    unused = np.repeat(np.arange(len(table), dtype=np.int32)[:, None], model.spec.vocab - table.shape[1], axis=1)
    stop_SV = jax.device_put(np.concatenate([table, unused], axis=1), replicated(sampler.mesh))
    return Collector(
        config.env,
        tokenizer,
        sampler,
        stop_SV,
        rollout.group_size,
        rollout.prompt_bucket,
        _slots(config, sampler.mesh),
        rollout.workers,
        rollout.env_timeout_s,
        episode_tokens=rollout.max_episode_tokens,
        hint_tokens=config.critic.privileged if config.advantage.needs_values else 0,
        compactor=_compactor(config, tokenizer, sampler),
        judge=_judge(config, model),
        prompt_limit=PromptLimit(rollout.max_prompt_tokens, rollout.long_prompts),
    )


def _slots(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Episodes that this process writes at a time: its share, rounded up to what its devices split evenly."""
    slots, processes = (
        config.rollout.rows if config.rollout.slots is None else config.rollout.slots,
        jax.process_count(),
    )
    shards = row_shards(mesh)
    return slots if processes == 1 else -(-slots // (shards * processes)) * shards


def _judge(config: Config, model: ModelDef) -> Judge | None:
    rollout = config.rollout
    if not rollout.exact:
        return None
    platform = platform_of(model.mesh)
    if platform != "cpu" or model.spec.moe is not None:
        where = f"these devices are {platform}" if platform != "cpu" else "this model has experts"
        raise ConfigError(
            f"rollout.exact=true: {where}, where the same row is not computed the same way in every batch; it holds "
            "for dense models on a CPU: set rollout.exact=false"
        )
    longest = max(rollout.max_turn_tokens, rollout.written)
    return Judge(model, config.update.microbatch_rows, rollout.row_bucket, config.actions, longest)


def _compactor(config: Config, tokenizer: Tokenizer, sampler: SamplerDef) -> Compactor | None:
    settings = config.rollout.compaction
    if settings is None:
        return None
    compactor = Compactor(settings, tokenizer, sampler.positions, sampler.turn_tokens)
    compactor.check()
    return compactor


def plain(collector: Collector) -> Collector:
    """The same episodes by decoding alone, without injected gaps, and nothing kept of them that only training reads."""
    off = {"record_experts": False, "records": NO_RECORDS, "logit_noise": 0.0, "hidden_noise": 0.0, "int8_cache": False}
    return replace(collector, sampler=replace(collector.sampler, **off), judge=None)


def greedy(collector: Collector) -> Collector:
    """The same episodes, one of each task, always with the most likely token."""
    same = plain(collector)
    return replace(same, sampler=replace(same.sampler, greedy=True), group_size=1)


def _check_actor(config: Config, model: ModelDef) -> None:
    """Check what can be told of the policy's model before its weights are read."""
    if config.rollout.record_experts and model.spec.moe is None:
        raise ConfigError(
            "rollout.record_experts=true: this model has no experts to record; set rollout.record_experts=null"
        )
    _check_mesh(config, model)


def _check_mesh(config: Config, model: ModelDef) -> None:
    """Check what of the model its meshes split."""
    faults = undivided(config, model.spec.axis_sizes(), "actor" if model.head is None else "critic")
    if faults:
        raise ConfigError("; ".join(faults))


def _check_statistics(config: Config, model: ModelDef) -> None:
    """Check what computes token statistics, and what is recorded for them, against vocabulary and devices."""
    vocabulary, top_k = model.spec.vocab, config.loss.records.top_k
    if top_k > vocabulary:
        raise ConfigError(
            f"loss.top_k={top_k}: the vocabulary has {vocabulary} tokens; set loss.top_k to {vocabulary} or less, or "
            f"loss.support=full"
        )
    if model.statistics in (None, "reference"):
        return
    try:
        choose(model.statistics, platform_of(model.mesh), vocabulary // config.mesh.tensor)
    except ValueError as fault:
        raise ConfigError(f"model.statistics={model.statistics}: {fault}") from fault
