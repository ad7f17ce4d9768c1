"""Settings of sampling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.mesh import MeshConfig


class RolloutConfig(Component):
    """How many episodes a step samples, and the limits of each."""

    prompts: int = Field(default=8, ge=1, description="tasks a step")
    group_size: int = Field(default=4, ge=1, description="episodes a task")
    max_turn_tokens: int = Field(default=64, ge=1, description="tokens of one assistant turn, at most")
    max_tokens: int = Field(default=512, ge=8, description="tokens of a row (prompt, turns and observations), at most")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature; also divides the trainer's logits")
    prompt_bucket: int = Field(
        default=16,
        ge=1,
        description="prompt lengths are padded up to a multiple of this; in sampling, to this times a power of two",
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
    record_experts: bool = Field(
        default=True,
        description="models with experts: keep which experts the sampler chose, and use them again when the policy is "
        "trained (R3); costs 2 bytes a token, layer and chosen expert",
    )
    bucket: int = Field(default=64, ge=1, description="lengths of what follows a prompt, likewise")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="compute type of the sampler, weights and cache; null: model.dtype"
    )
    mesh: MeshConfig | None = Field(
        default=None,
        description="the trainer's devices in another order of axes, for sampling: slots over data, fsdp and expert, "
        "heads over tensor (fsdp=4 in training, data=4 here, gathers weights once a step); null: mesh",
    )

    @property
    def rows(self) -> int:
        """Episodes a step."""
        return self.prompts * self.group_size

    @property
    def cuts(self) -> bool:
        """Some tokens may not be drawn."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0
