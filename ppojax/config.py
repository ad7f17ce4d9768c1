"""The root config: the sections of a run, and which of their values cannot hold together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from ppojax.advantages import GAE, AdvantageEstimator, Group
from ppojax.component import Component
from ppojax.envs import EnvConfig
from ppojax.losses import DPPO, Loss
from ppojax.mesh import AXES, MeshConfig
from ppojax.models.settings import CutCritic, FreshCritic, FreshSpec, ModelConfig
from ppojax.models.value_head import HLGaussHead
from ppojax.rollout.settings import RolloutConfig
from ppojax.runtime.settings import CheckpointConfig
from ppojax.settings import Contradiction, Settings, load_config
from ppojax.settings.foreign import FOREIGN_KEYS
from ppojax.types import NO_RECORDS, Records
from ppojax.update.settings import ActorConfig, CriticConfig, OptimizerConfig, UpdateConfig, WarmStartConfig


class RunConfig(Component):
    """Where a run leaves its files: `<dir>/<name>/`."""

    name: str = Field(default="run", description="folder of the run inside dir")
    dir: str = Field(default="runs", min_length=1, description="folder that holds runs")
    tensorboard: bool = Field(default=True, description="also write the metrics for TensorBoard")
    keep_memory: bool = Field(
        default=True,
        description="keep freed host memory for the next step instead of returning it to the system: a third faster on "
        "CPU, and a larger process; without use where only accelerators compute",
    )
    compilation_cache: str | None = Field(
        default=None, description="folder that keeps compiled programs for the next start; it holds native code"
    )

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*", name):
            raise ValueError("expected the name of a folder: letters, digits and . _ = + -, no leading dot or dash")
        return name


class EvalConfig(Component):
    """How held-out tasks are tried while training."""

    every: int = Field(
        default=10, ge=0, description="steps between evaluations, which also open and close a run; 0 for none"
    )
    prompts: int = Field(default=64, ge=1, description="held-out tasks, the same ones each time")
    samples: int = Field(
        default=8, ge=1, description="sampled answers a task for pass@k, in `python -m ppojax.evaluate`"
    )


class Config(Settings):
    """A training run."""

    foreign_keys: ClassVar[Mapping[str, str]] = FOREIGN_KEYS

    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of all randomness")
    steps: int = Field(default=100, ge=1, description="training steps: each samples episodes once and updates on them")
    resume: bool | Literal["strict"] = Field(
        default=False, description="go on from the last checkpoint that is whole; strict: only from the very last one"
    )
    run: RunConfig = Field(default=RunConfig(), description="where the run leaves its files")
    mesh: MeshConfig = Field(default=MeshConfig(), description="devices along each axis")
    model: ModelConfig = Field(default=ModelConfig(), description="the policy's model")
    actor: ActorConfig = Field(default=ActorConfig(), description="the policy's update")
    critic: CriticConfig = Field(
        default=CriticConfig(), description="the critic and its update; left alone when advantages need no values"
    )
    env: EnvConfig = Field(description="tasks, and what answers the policy")
    rollout: RolloutConfig = Field(default=RolloutConfig(), description="how episodes are sampled")
    advantage: AdvantageEstimator = Field(default=GAE(), description="credit of each token")
    loss: Loss = Field(default=DPPO(), description="the policy's loss")
    update: UpdateConfig = Field(default=UpdateConfig(), description="how a step's rows become optimizer steps")
    warm_start: WarmStartConfig | None = Field(
        default=None, description="supervised steps before the first training step"
    )
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="when checkpoints are written")
    eval: EvalConfig = Field(default=EvalConfig(), description="when held-out tasks are tried")

    @classmethod
    def load(cls, *arguments: str) -> Config:
        """Read `config=a.yaml,b.yaml` and `key.sub=value` arguments, as on the command line.

        Raises ConfigError with one line for each fault.
        """
        return load_config(cls, arguments).config

    @property
    def records(self) -> Records:
        """What the sampler keeps of its distribution at each action: for the loss, and for the log."""
        asked = self.loss.records
        return asked._replace(hidden=asked.hidden or self.rollout.record_hidden)

    def contradictions(self) -> Iterator[Contradiction]:
        """List the settings that cannot hold together, as far as can be told without loading weights."""
        yield from _model(self)
        yield from _rows(self)
        yield from _tokens(self)
        yield from _slots(self)
        yield from _records(self)
        yield from _schedules(self)
        yield from _supports(self)
        if self.advantage.needs_values:
            yield from _critic(self)
        if self.warm_start is not None:
            yield from _warm_start(self)


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
        yield from _shape(config, model.fresh, "model.fresh")
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


def _shape(config: Config, shape: FreshSpec, key: str) -> Iterator[Contradiction]:
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
            f"kv_heads may be {_divisors(shape.heads)}",
        )
    yield from _split(config.mesh, "mesh", shape, key)


def _split(mesh: MeshConfig, where: str, shape: FreshSpec, key: str) -> Iterator[Contradiction]:
    split = [
        ("fsdp", mesh.fsdp, shape.width, "width"),
        ("tensor", mesh.tensor, shape.heads, "heads"),
        ("tensor", mesh.tensor, shape.kv_heads, "kv_heads"),
        ("tensor", mesh.tensor, shape.ffn, "ffn"),
    ]
    if shape.moe is not None:
        split.append(("tensor", mesh.tensor, shape.moe.ffn, "moe.ffn"))
        split.append(("expert", mesh.expert, shape.moe.experts, "moe.experts"))
    for axis, parts, size, name in split:
        if size % parts:
            yield Contradiction(
                (f"{where}.{axis}", f"{key}.{name}"),
                f"{name} is split over {where}.{axis} and does not divide",
                f"{where}.{axis} may be {_divisors(size)}",
            )


def _rows(config: Config) -> Iterator[Contradiction]:
    rollout, update, mesh = config.rollout, config.update, config.mesh
    counted = ("rollout.prompts", "rollout.group_size")
    if isinstance(config.advantage, Group) and rollout.group_size == 1:
        yield Contradiction(
            ("advantage.type", "rollout.group_size"),
            "an episode is compared with the others of its task, and there are none",
            "set rollout.group_size to 2 or more, or advantage.type=gae",
        )
    rows = rollout.rows // update.minibatches
    if rollout.rows % update.minibatches:
        yield Contradiction(
            (*counted, "update.minibatches"),
            f"{rollout.rows} episodes a step are not dealt out evenly",
            f"update.minibatches may be {_divisors(rollout.rows)}",
        )
    elif rows % update.microbatch_rows:
        yield Contradiction(
            (*counted, "update.minibatches", "update.microbatch_rows"),
            f"the {rows} rows of a minibatch are not cut evenly",
            f"update.microbatch_rows may be {_divisors(rows, mesh.row_shards)}",
        )
    elif update.microbatch_rows % mesh.row_shards:
        yield Contradiction(
            ("update.microbatch_rows", "mesh.data", "mesh.fsdp", "mesh.expert"),
            f"the rows of a microbatch are not split evenly over {mesh.row_shards} devices",
            f"update.microbatch_rows may be {_divisors(rows, mesh.row_shards)}",
        )
    elif update.shared_prefix and update.microbatch_rows % rollout.group_size:
        yield Contradiction(
            ("update.microbatch_rows", "rollout.group_size"),
            f"a microbatch would tear groups of {rollout.group_size} episodes that share their prompt",
            f"update.microbatch_rows may be {_divisors(rows, rollout.group_size)}, or set update.shared_prefix=false",
        )


def _tokens(config: Config) -> Iterator[Contradiction]:
    if config.rollout.max_turn_tokens >= config.rollout.max_tokens:
        yield Contradiction(
            ("rollout.max_turn_tokens", "rollout.max_tokens"),
            "a turn leaves no room for the prompt in its row",
            "raise rollout.max_tokens or lower rollout.max_turn_tokens",
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
    if mesh.size != config.mesh.size:
        yield Contradiction(
            tuple(f"{key}.{axis}" for key in (where, "mesh") for axis in AXES),
            f"the sampler's mesh has {mesh.size} devices and the trainer's {config.mesh.size}, and they are to be the "
            "same",
            f"make the product of rollout.mesh {config.mesh.size}, or set rollout.mesh=null",
        )
    if rollout.mesh is not None and config.model.fresh is not None:
        yield from _split(rollout.mesh, "rollout.mesh", config.model.fresh, "model.fresh")
    if rollout.cuts and config.loss.records != NO_RECORDS:
        yield Contradiction(
            ("rollout.top_k", "rollout.top_p", "rollout.min_p", "loss.support", "loss.compare_supports"),
            "the loss compares whole distributions, and the sampler would draw from a cut one that is not recorded",
            "set rollout.top_k=0, rollout.top_p=1 and rollout.min_p=0, or loss.support=binary and "
            "loss.compare_supports=false",
        )


def _records(config: Config) -> Iterator[Contradiction]:
    rollout, loss = config.rollout, config.loss
    if rollout.cuts and rollout.record_hidden:
        yield Contradiction(
            ("rollout.top_k", "rollout.top_p", "rollout.min_p", "rollout.record_hidden"),
            "hidden states do not tell what was cut off the distribution, and the exact gap would be of another one",
            "set rollout.top_k=0, rollout.top_p=1 and rollout.min_p=0, or rollout.record_hidden=false",
        )
    if rollout.mismatch.logit_noise and config.records.hidden:
        asked = ("loss.support", "loss.compare_supports") if loss.records.hidden else ("rollout.record_hidden",)
        yield Contradiction(
            ("rollout.mismatch.logit_noise", *asked),
            "hidden states do not tell the noise on the logits, and the policy would be compared with another one",
            "set rollout.mismatch.logit_noise=0, or leave hidden states out (rollout.record_hidden=false, and with "
            "dppo loss.support=binary or topk and loss.compare_supports=false)",
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
        yield from _shape(config, critic.model.shape, "critic.model.shape")
    yield from _ensemble(config)
    if isinstance(critic.head, HLGaussHead) and critic.loss.clip is not None:
        yield Contradiction(
            ("critic.head.type", "critic.loss.clip"),
            "a distribution over bins is fitted by cross-entropy, which has no clip",
            "set critic.loss.clip=null",
        )
    if critic.warmup_steps >= config.steps:
        yield Contradiction(
            ("critic.warmup_steps", "steps"),
            "the policy would never be trained",
            "raise steps or lower critic.warmup_steps",
        )


def _ensemble(config: Config) -> Iterator[Contradiction]:
    critic, rollout = config.critic, config.rollout
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


def _divisors(n: int, multiple_of: int = 1) -> str:
    """List the divisors of n that are multiples of a number: `1, 2, 4`."""
    divisors = [d for d in range(1, n + 1) if n % d == 0 and d % multiple_of == 0]
    return ", ".join(map(str, divisors)) or f"nothing: make {n} a multiple of {multiple_of}"
