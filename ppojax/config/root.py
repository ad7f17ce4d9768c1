"""The root config: the sections of a run, and which of their values cannot hold together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from ppojax.advantages import GAE, AdvantageEstimator
from ppojax.advantages.reward_scaling import RewardScaling
from ppojax.component import Component
from ppojax.config.contradictions import contradictions
from ppojax.envs import EnvConfig
from ppojax.losses import DPPO, KLReward, Loss
from ppojax.losses.entropy import EntropyControl
from ppojax.losses.policy import PolicyLoss
from ppojax.mesh import MeshConfig
from ppojax.models.settings import ModelConfig
from ppojax.processes.settings import ProcessesConfig
from ppojax.rollout.settings import RolloutConfig
from ppojax.runtime.settings import CheckpointConfig
from ppojax.settings import Contradiction, Settings, load_config
from ppojax.settings.foreign import FOREIGN_KEYS
from ppojax.types import Records
from ppojax.update.settings import ActorConfig, CriticConfig, UpdateConfig, WarmStartConfig


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
        default="auto",
        min_length=1,
        description="folder that keeps compiled programs for the next start, which are native code, so nobody else may "
        "write in it; auto: ppojax/compiled in the user's cache folder; null: keep none",
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
    processes: ProcessesConfig = Field(default=ProcessesConfig(), description="who is who in a run of many processes")
    model: ModelConfig = Field(default=ModelConfig(), description="the policy's model")
    actor: ActorConfig = Field(default=ActorConfig(), description="the policy's update")
    critic: CriticConfig = Field(
        default=CriticConfig(), description="the critic and its update; left alone when advantages need no values"
    )
    env: EnvConfig = Field(description="tasks, and what answers the policy")
    rollout: RolloutConfig = Field(default=RolloutConfig(), description="how episodes are sampled")
    advantage: AdvantageEstimator = Field(default=GAE(), description="credit of each token")
    reward_scaling: RewardScaling | None = Field(
        default=None, description="learn from rewards on another scale, such as -1 to 1; null: on the environment's"
    )
    kl_reward: KLReward | None = Field(
        default=None, description="take the KL to the reference policy off the rewards; null: leave them alone"
    )
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
    def actions(self) -> int:
        """Action positions of a row, at most."""
        return self.env.max_turns * self.rollout.max_turn_tokens + self.rollout.written

    @property
    def records(self) -> Records:
        """What the sampler keeps of its distribution at each action: for the loss, and for the log."""
        asked = self.loss.records
        return asked._replace(hidden=asked.hidden or self.rollout.record_hidden)

    @property
    def needs(self) -> frozenset[str]:
        """What is scored before the update: `logp_old`, `logp_ref`, `hidden_ref`."""
        return self.loss.needs | (frozenset() if self.kl_reward is None else self.kl_reward.needs)

    @property
    def entropy_control(self) -> EntropyControl | None:
        """What moves the entropy bonus."""
        return self.loss.entropy_control if isinstance(self.loss, PolicyLoss) else None

    def same_everywhere(self) -> str:
        """The config without what differs between processes, or between a run and its continuation, as YAML."""
        return self.model_copy(update={"processes": ProcessesConfig()}).to_yaml()

    def contradictions(self) -> Iterator[Contradiction]:
        """List the settings that cannot hold together, as far as can be told without loading weights."""
        return contradictions(self)
