"""Which settings of a run cannot hold together, as far as can be told without loading weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ppojax.advantages import GAE, Group
from ppojax.config.bounds import bounds
from ppojax.config.meshes import critic_mesh, divisors, idle, meshes, split, uneven
from ppojax.config.sampling import sampling
from ppojax.losses import DPPO
from ppojax.losses.policy import PolicyLoss
from ppojax.models.settings import CutCritic, FreshCritic, FreshSpec
from ppojax.models.value_head import HLGaussHead, LinearHead
from ppojax.settings import Contradiction
from ppojax.types import NO_RECORDS
from ppojax.update.settings import OptimizerConfig

if TYPE_CHECKING:
    from ppojax.config.root import Config


def contradictions(config: Config) -> Iterator[Contradiction]:
    """List them."""
    yield from _model(config)
    yield from meshes(config)
    yield from _rows(config)
    yield from _tokens(config)
    yield from _history(config)
    yield from _slots(config)
    yield from sampling(config)
    yield from _schedules(config)
    yield from _supports(config)
    yield from _groups(config)
    yield from _entropy(config)
    yield from _perturb(config)
    if config.advantage.needs_values:
        yield from _critic(config)
    if config.warm_start is not None:
        yield from _warm_start(config)


def _groups(config: Config) -> Iterator[Contradiction]:
    if config.rollout.dynamic_rounds > 1 and config.rollout.group_size == 1:
        yield Contradiction(
            ("rollout.dynamic_rounds", "rollout.group_size"),
            "groups of one episode never differ in their rewards",
            "set rollout.dynamic_rounds=1, or rollout.group_size to 2 or more",
        )


def _entropy(config: Config) -> Iterator[Contradiction]:
    loss = config.loss
    if isinstance(loss, PolicyLoss) and loss.entropy_control is not None and loss.entropy_coefficient <= 0:
        yield Contradiction(
            ("loss.entropy_control.target", "loss.entropy_coefficient"),
            "the control scales the bonus, and there is none",
            "set loss.entropy_coefficient, for instance to 0.001, or loss.entropy_control=null",
        )
    if isinstance(config.advantage, GAE) and config.advantage.ensemble.disputed > 0 and not loss.entropy:
        bonus = "loss.entropy_coefficient" if isinstance(loss, PolicyLoss) else "loss.type"
        yield Contradiction(
            ("advantage.ensemble.disputed", bonus),
            "tokens are left out of an entropy bonus that there is not",
            "set loss.entropy_coefficient, for instance to 0.001, or advantage.ensemble.disputed=0",
        )


def _perturb(config: Config) -> Iterator[Contradiction]:
    if config.actor.perturb is not None and "logp_old" in config.loss.needs:
        yield Contradiction(
            ("actor.perturb", "loss.type", "loss.anchor"),
            "the policy with noise is compared with the sampler, and this loss takes a ratio to the policy at the "
            "start of the update",
            "set loss.anchor=behavior where the loss has it (ppo, gspo, cispo, dppo, minirl), or actor.perturb=null",
        )


def _model(config: Config) -> Iterator[Contradiction]:
    model = config.model
    if model.path is None and model.fresh is None:
        yield Contradiction(
            ("model.path", "model.fresh"),
            "there is no model",
            "give model.path=smollm2 (or a folder, a .gguf file, a hub id), or model.fresh.layers=... for a new one",
        )
    elif model.path is not None and model.fresh is not None:
        yield Contradiction(
            ("model.path", "model.fresh"),
            "a model is either loaded or made from scratch",
            "set model.path=null or model.fresh=null",
        )
    elif model.fresh is not None:
        if model.tokenizer is None:
            yield Contradiction(
                ("model.fresh", "model.tokenizer"),
                "a model from scratch brings no tokenizer",
                "set model.tokenizer=char",
            )
        yield from _shape(model.fresh, "model.fresh")
        if config.rollout.record_experts and model.fresh.moe is None:
            yield Contradiction(
                ("rollout.record_experts", "model.fresh.moe"),
                "a dense model has no experts whose choice could be replayed",
                "set rollout.record_experts=null, or model.fresh.moe.experts",
            )
        yield from split(config.mesh, "mesh", model.fresh, "model.fresh")
    elif model.tokenizer is not None:
        yield Contradiction(
            ("model.path", "model.tokenizer"),
            "a loaded model brings its own tokenizer",
            "set model.tokenizer=null",
        )
    if model.base_dtype != "float32" and model.lora is None and config.critic.lora is None:
        yield Contradiction(
            ("model.base_dtype", "model.lora"),
            "weights that are trained are kept in float32",
            "set model.lora.rank for adapters, or model.base_dtype=float32",
        )


def _shape(shape: FreshSpec, key: str) -> Iterator[Contradiction]:
    if shape.width % (2 * shape.heads):
        yield Contradiction(
            (f"{key}.width", f"{key}.heads"),
            "heads have equal, even widths",
            f"make width a multiple of {2 * shape.heads}",
        )
    if shape.heads % shape.kv_heads:
        yield Contradiction(
            (f"{key}.heads", f"{key}.kv_heads"),
            "each key/value head serves the same number of heads",
            f"kv_heads may be {divisors(shape.heads)}",
        )


def _rows(config: Config) -> Iterator[Contradiction]:
    rollout, update = config.rollout, config.update
    counted = ("rollout.prompts", "rollout.group_size")
    if isinstance(config.advantage, Group) and config.advantage.baseline != "none" and rollout.group_size == 1:
        yield Contradiction(
            ("advantage.type", "advantage.baseline", "rollout.group_size"),
            "an episode is compared with the others of its task, and there are none",
            "set rollout.group_size to 2 or more, advantage.type=gae, or advantage.baseline=none and "
            "advantage.scale=none",
        )
    rows = rollout.rows // update.minibatches
    if rollout.rows % update.minibatches:
        yield Contradiction(
            (*counted, "update.minibatches"),
            f"{rollout.rows} episodes a step are not dealt out evenly",
            f"update.minibatches may be {divisors(rollout.rows)}",
        )
    elif rows % update.microbatch_rows:
        yield Contradiction(
            (*counted, "update.minibatches", "update.microbatch_rows"),
            f"the {rows} rows of a minibatch are not cut evenly",
            f"update.microbatch_rows may be {divisors(rows, config.mesh.row_shards)}",
        )
    elif faults := list(uneven(config, rows)):
        yield from faults
    elif update.shared_prefix and update.microbatch_rows % rollout.group_size:
        yield Contradiction(
            ("update.microbatch_rows", "rollout.group_size"),
            f"a microbatch would tear groups of {rollout.group_size} episodes that share their prompt",
            f"update.microbatch_rows may be {divisors(rows, rollout.group_size)}, or set update.shared_prefix=false",
        )
    elif update.shared_prefix:
        yield from idle(config, rows)


def _tokens(config: Config) -> Iterator[Contradiction]:
    if config.rollout.max_turn_tokens >= config.rollout.max_tokens:
        yield Contradiction(
            ("rollout.max_turn_tokens", "rollout.max_tokens"),
            "a turn leaves no room for the prompt in its row",
            "raise rollout.max_tokens or lower rollout.max_turn_tokens",
        )


def _history(config: Config) -> Iterator[Contradiction]:
    if config.env.writes_tokens and config.rollout.compaction is not None:
        yield Contradiction(
            ("rollout.compaction", "env.type"),
            "this environment writes its prompts as tokens, and shortens the history itself",
            "set rollout.compaction=null",
        )


def _slots(config: Config) -> Iterator[Contradiction]:
    rollout = config.rollout
    where, mesh = ("mesh", config.mesh) if rollout.mesh is None else ("rollout.mesh", rollout.mesh)
    shards, axes = mesh.row_shards, tuple(f"{where}.{axis}" for axis in ("data", "fsdp", "expert"))
    if rollout.slots is not None and rollout.slots % shards:
        yield Contradiction(
            ("rollout.slots", *axes),
            f"slots are not split evenly over {shards} devices",
            f"make rollout.slots a multiple of {shards}",
        )
    if rollout.slots is None and rollout.mesh is not None and rollout.rows % shards:
        yield Contradiction(
            ("rollout.prompts", "rollout.group_size", *axes),
            f"{rollout.rows} slots, one for each episode, are not split evenly over {shards} devices",
            f"set rollout.slots to a multiple of {shards}",
        )
    if rollout.devices == "own" and rollout.mesh is None:
        yield Contradiction(
            ("rollout.devices", "rollout.mesh"),
            "the sampler has devices of its own, and nothing says how many",
            "set rollout.mesh.data (or another axis), or rollout.devices=shared",
        )
    if rollout.cuts and config.loss.records != NO_RECORDS:
        yield Contradiction(
            ("rollout.top_k", "rollout.top_p", "rollout.min_p", "loss.support", "loss.compare_supports"),
            "the loss compares whole distributions, and the sampler would draw from a cut one that is not recorded",
            "set rollout.top_k=0, rollout.top_p=1 and rollout.min_p=0, or loss.support=binary and "
            "loss.compare_supports=false",
        )


def _schedules(config: Config) -> Iterator[Contradiction]:
    optimizers: dict[str, OptimizerConfig] = {"actor.optimizer": config.actor.optimizer}
    if config.advantage.needs_values:
        optimizers["critic.optimizer"] = config.critic.optimizer
    if config.warm_start is not None:
        optimizers["warm_start.optimizer"] = config.warm_start.optimizer
    for key, optimizer in optimizers.items():
        if optimizer.schedule != "constant" and optimizer.decay_steps == 0:
            yield Contradiction(
                (f"{key}.schedule", f"{key}.decay_steps"),
                "the learning rate would fall to zero at once",
                f"set {key}.decay_steps, or {key}.schedule=constant",
            )


def _supports(config: Config) -> Iterator[Contradiction]:
    loss = config.loss
    if isinstance(loss, DPPO) and loss.anchor == "old" and loss.records != NO_RECORDS:
        yield Contradiction(
            ("loss.anchor", "loss.support", "loss.compare_supports"),
            "only the sampler keeps more of its distribution than the drawn token: the old policy has no other support",
            "set loss.anchor=behavior, or loss.support=binary and loss.compare_supports=false",
        )


def _critic(config: Config) -> Iterator[Contradiction]:
    critic, fresh = config.critic, config.model.fresh
    if isinstance(critic.model, CutCritic) and fresh is not None and critic.model.layers > fresh.layers:
        yield Contradiction(
            ("critic.model.layers", "model.fresh.layers"),
            "the critic takes more blocks than the actor has",
            f"set critic.model.layers to {fresh.layers} or less",
        )
    if isinstance(critic.model, FreshCritic):
        yield from _shape(critic.model.shape, "critic.model.shape")
        own = critic_mesh(config)
        where, mesh = ("mesh", config.mesh) if own is None else ("critic.mesh", own)
        yield from split(mesh, where, critic.model.shape, "critic.model.shape")
    yield from _ensemble(config)
    yield from _frozen(config)
    yield from bounds(config)
    if isinstance(critic.head, LinearHead) and critic.loss.cross_entropy:
        yield Contradiction(
            ("critic.head.type", "critic.loss.cross_entropy"),
            "a value without bounds is no probability, of which there could be a cross-entropy",
            "set critic.head.type=arctan with its bounds, or critic.loss.cross_entropy=false",
        )
    if (isinstance(critic.head, HLGaussHead) or critic.loss.cross_entropy) and critic.loss.clip is not None:
        why = "critic.loss.cross_entropy" if critic.loss.cross_entropy else "critic.head.type"
        yield Contradiction(
            (why, "critic.loss.clip"),
            "the head is fitted by cross-entropy, which has no clip",
            "set critic.loss.clip=null",
        )
    if critic.warmup_steps >= config.steps:
        yield Contradiction(
            ("critic.warmup_steps", "steps"),
            "the policy would never be trained",
            "raise steps or lower critic.warmup_steps",
        )


def _frozen(config: Config) -> Iterator[Contradiction]:
    if config.critic.freeze != "none" and config.critic.lora is not None:
        yield Contradiction(
            ("critic.freeze", "critic.lora"),
            "with adapters all of the critic's own weights stand still",
            "set critic.freeze=none, or critic.lora=null",
        )


def _ensemble(config: Config) -> Iterator[Contradiction]:
    critic, rollout, advantage = config.critic, config.rollout, config.advantage
    if isinstance(advantage, GAE) and advantage.ensemble.on and critic.count == 1:
        yield Contradiction(
            ("advantage.ensemble.agreed", "advantage.ensemble.disputed", "critic.count"),
            "one critic does not disagree with itself",
            "set critic.count to 2 or more, or advantage.ensemble.agreed=0 and advantage.ensemble.disputed=0",
        )
    if isinstance(advantage, GAE) and advantage.ensemble.on and critic.split == "none" and not critic.noise:
        yield Contradiction(
            ("advantage.ensemble.agreed", "advantage.ensemble.disputed", "critic.split", "critic.noise"),
            "critics that start alike and learn from the same rows never disagree",
            "set critic.split=responses or prompts, or critic.noise",
        )
    dealt = {"prompts": ("rollout.prompts", rollout.prompts), "responses": ("rollout.group_size", rollout.group_size)}
    if critic.split in dealt:
        key, size = dealt[critic.split]
        if critic.count > size:
            yield Contradiction(
                ("critic.count", "critic.split", key),
                f"{size} {critic.split} do not go round among {critic.count} critics",
                f"set critic.count to {size} or less, or critic.split=none",
            )


def _warm_start(config: Config) -> Iterator[Contradiction]:
    assert config.warm_start is not None
    if not config.env.has_expert:
        yield Contradiction(
            ("warm_start.steps", "env.type"),
            "this environment has no expert to learn from",
            "set warm_start=null",
        )
    if config.warm_start.rows % config.mesh.row_shards:
        yield Contradiction(
            ("warm_start.rows", "mesh.data", "mesh.fsdp", "mesh.expert"),
            f"demonstrations are not split evenly over {config.mesh.row_shards} devices",
            f"make warm_start.rows a multiple of {config.mesh.row_shards}",
        )
