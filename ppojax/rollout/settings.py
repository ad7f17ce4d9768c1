"""Settings of sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.errors import ConfigError
from ppojax.lazy import jax
from ppojax.mesh import MeshConfig
from ppojax.rollout.mismatch import Mismatch


class _Shared(Component):
    limit: int | None = Field(
        default=None,
        ge=8,
        description="tokens of a context from which on its history is replaced before the next turn; null: when the "
        "next turn might not fit",
    )
    most: int = Field(default=3, ge=1, le=255, description="replacements in an episode, at most; then it is truncated")


class Truncate(_Shared):
    """Old turns are left out; the prompt and the last turns stay."""

    type: Literal["truncate"] = Field(default="truncate", description="leave old turns out")
    keep_turns: int = Field(default=2, ge=1, description="last turns that stay, with what was answered to them")

    @property
    def written(self) -> int:
        """Tokens that the policy writes for it, at most."""
        return 0


class Summarize(_Shared):
    """The policy writes a summary, which takes the place of the old turns (CompactionRL, arXiv 2607.05378; SUPO,
    arXiv 2510.06727)."""

    type: Literal["summary"] = Field(default="summary", description="let the policy write a summary")
    keep_turns: int = Field(default=1, ge=0, description="last turns that stay beside the summary")
    max_tokens: int = Field(default=256, ge=1, description="tokens of a summary, at most")
    request: str = Field(
        default="Your context is nearly full. Summarize what was done and found so far, and what remains to be done: "
        "the conversation goes on from your summary.",
        description="what the policy is asked, as a user",
    )
    header: str = Field(
        default="\n\nSummary of your work so far:\n", description="what stands between the prompt and a summary"
    )

    @property
    def written(self) -> int:
        """Tokens that the policy writes for it, at most."""
        return self.max_tokens


Compaction = Annotated[
    Truncate | Summarize, Field(discriminator="type", description="how the history of a full context is replaced")
]


class RolloutConfig(Component):
    """How many episodes a step samples, and the limits of each."""

    mode: Literal["sync", "one_step_off"] = Field(
        default="sync",
        description="sync: a step's episodes are played before its update; one_step_off: while steps before it are "
        "trained, with weights that are max_staleness steps older than those of its update (docs/asynchrony.md)",
    )
    max_staleness: int = Field(
        default=1,
        ge=1,
        description="one_step_off: training steps between the weights that play and those that learn from it, never "
        "more, and fewer only in the first steps; costs a copy of the trained weights for each",
    )
    prompts: int = Field(default=8, ge=1, description="tasks a step")
    group_size: int = Field(default=4, ge=1, description="episodes a task")
    max_turn_tokens: int = Field(default=64, ge=1, description="tokens of one assistant turn, at most")
    max_tokens: int = Field(default=512, ge=8, description="tokens of a row (prompt, turns and observations), at most")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="tokens of a prompt, at most; null: as many as leave room for a turn's first"
    )
    long_prompts: Literal["error", "drop", "truncate"] = Field(
        default="error",
        description="what is done with longer prompts; drop: their episodes fail, counted as error/LongPrompt; "
        "truncate: the longest message loses its middle, counted as data/prompts_cut",
    )
    max_failed: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="share of a step's episodes that may fail; with more, the step is tried again with other tasks",
    )
    retries: int = Field(default=3, ge=0, description="times in a row that this is done before the run ends")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature; also divides the trainer's logits")
    max_episode_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens that the policy writes in an episode, in all of its turns and rows, at most; then it is "
        "truncated; null: no such limit",
    )
    prompt_bucket: int = Field(
        default=16,
        ge=1,
        description="prompt lengths are padded up to a multiple of this, longer ones to fewer of them (four between "
        "powers of two), so that few programs are compiled; in sampling, to this times a power of two",
    )
    top_k: int = Field(default=0, ge=0, description="only this many of the likeliest tokens are drawn; 0 for all")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="only the fewest of the likeliest tokens that hold this share are drawn"
    )
    min_p: float = Field(
        default=0.0, ge=0, lt=1, description="only tokens at least this share as likely as the likeliest are drawn"
    )
    slots: int | None = Field(
        default=None,
        ge=1,
        description="episodes that are written at a time, the others wait; null: one slot for each episode of a step",
    )
    segment: int = Field(
        default=32,
        ge=1,
        le=1024,
        description="tokens that slots write before the next look at which are done: fewer refill slots sooner",
    )
    workers: int = Field(
        default=8,
        ge=0,
        le=1024,
        description="threads that step environments while others are written; their timing may change rounding; "
        "0: in order, in the sampler's own thread, the same to the bit every time",
    )
    env_timeout_s: float | None = Field(
        default=300.0,
        gt=0,
        description="seconds that an environment may take for a reset or step before its episode ends as an error; "
        "null: no limit",
    )
    dynamic_rounds: int = Field(
        default=1,
        ge=1,
        description="play more tasks, at most so many times as many, until enough groups have episodes with different "
        "rewards (DAPO's dynamic sampling); 1: take the groups as they are",
    )
    compaction: Compaction | None = Field(
        default=None,
        description="replace the history of a context that is full, and let the episode go on in another row; null: "
        "truncate the episode",
    )
    record_experts: bool | None = Field(
        default=None,
        description="keep which experts the sampler chose, and use them again when the policy is trained (R3); costs 2 "
        "bytes a token, layer and chosen expert; null: where the model has experts",
    )
    record_hidden: bool = Field(
        default=False,
        description="keep the final hidden state of each action whatever the loss, so that the log has the exact gap "
        "between sampler and trainer (sampling/tv_mean, sampling/kl_mean); costs model width numbers an action and "
        "one more pass over the vocabulary",
    )
    bucket: int = Field(
        default=64, ge=1, description="lengths of what follows a prompt, likewise, up to rollout.max_tokens"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="compute type of the sampler, weights and cache; null: model.dtype"
    )
    mesh: MeshConfig | None = Field(
        default=None,
        description="the trainer's devices in another order of axes, for sampling: slots over data, fsdp and expert, "
        "heads over tensor (fsdp=4 in training, data=4 here, gathers weights once a step); null: mesh",
    )
    devices: Literal["shared", "own"] = Field(
        default="shared",
        description="own: the sampler's mesh has devices of its own, the ones that follow the trainer's",
    )
    exact: bool = Field(
        default=False,
        description="score and draw each turn again by the trainer's own computation when it is over, so that sampler "
        "and trainer do not differ but for single roundings (float32 on a CPU, see ppojax/rollout/exact.py); costs a "
        "pass over the padded row for each turn",
    )
    mismatch: Mismatch = Field(
        default=Mismatch(), description="gaps between sampler and trainer, put in on purpose for studies; not evaluated"
    )

    @property
    def staleness(self) -> int:
        """Training steps between the weights that play and those that learn from it, at most and, soon, always."""
        return self.max_staleness if self.mode == "one_step_off" else self.mismatch.stale_steps

    def build_mesh(self, trainer: jax.sharding.Mesh) -> jax.sharding.Mesh:
        """Lay out the sampler's devices: on the trainer's mesh, or beside it.

        Raises:
            ConfigError: there are not enough devices for both.
        """
        if self.mesh is None:
            return trainer
        return self.mesh.rearrange(trainer) if self.devices == "shared" else self.mesh.build(trainer.size)

    def check_processes(self, count: int) -> None:
        """Raise ConfigError for what a run of many processes cannot do, all of it."""
        faults = {
            "rollout.exact=true: it holds within one process: set rollout.exact=false": self.exact,
            "rollout.mode=one_step_off: the threads of many processes would have to ask their devices for the same "
            "things in the same order: set rollout.mode=sync": self.mode == "one_step_off",
            "rollout.devices=own: each process samples on the devices that it trains on: set rollout.devices=shared "
            "rollout.mesh=null": self.devices == "own",
        }
        if count > 1 and any(faults.values()):
            raise ConfigError("\n".join(f"{fault}, or use one process" for fault, wrong in faults.items() if wrong))

    @property
    def rows(self) -> int:
        """Episodes a step."""
        return self.prompts * self.group_size

    @property
    def written(self) -> int:
        """Tokens of a row that the policy writes beside its turns, at most."""
        return 0 if self.compaction is None else self.compaction.written

    @property
    def row_bucket(self) -> int:
        """What rows are padded to a multiple of; with `exact` all to one length, the sampler's and the trainer's."""
        return self.max_tokens if self.exact else self.bucket

    @property
    def cuts(self) -> bool:
        """Some tokens may not be drawn."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0
