"""Settings of sampling."""

from __future__ import annotations

from pydantic import Field

from ppojax.component import Component


class RolloutConfig(Component):
    """How many episodes a step samples, and the limits of each."""

    prompts: int = Field(default=8, ge=1, description="tasks a step")
    group_size: int = Field(default=4, ge=1, description="episodes a task")
    max_turn_tokens: int = Field(default=64, ge=1, description="tokens of one assistant turn, at most")
    max_tokens: int = Field(default=512, ge=8, description="tokens of a row (prompt, turns and observations), at most")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature; also divides the trainer's logits")
    prompt_bucket: int = Field(default=16, ge=1, description="prompt lengths are padded up to a multiple of this")
    record_experts: bool = Field(
        default=True,
        description="models with experts: keep which experts the sampler chose, and use them again when the policy is "
        "trained (R3); costs 2 bytes a token, layer and chosen expert",
    )
    bucket: int = Field(default=64, ge=1, description="lengths of what follows a prompt, likewise")

    @property
    def rows(self) -> int:
        """Episodes a step."""
        return self.prompts * self.group_size
