"""What a part of a reward sees, and what it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field

from ppojax.component import Component
from ppojax.types import Messages


@dataclass(frozen=True)
class Answered:
    """A finished episode, as rewards see it."""

    completion: str  # the text of the last assistant turn
    extracted: str | None  # the answer found in it, None where there is none
    answer: Any = None  # the reference, as the task gives it
    messages: Messages = field(
        default_factory=list
    )  # the whole conversation, the last turn included, as `Env.step` gets it
    record: dict[str, Any] = field(default_factory=dict)  # all that the task's source says about it


class Part(Component):
    """One part of a reward: called with an `Answered`, it gives a score, or several by name."""

    # Whether a score of 1 says that the answer is right; other parts shape how it is written.
    decides: ClassVar[bool] = True

    weight: float = Field(default=1.0, description="what its score is multiplied by in the reward")

    def load(self) -> None:
        """Load what it needs from outside. Raises ConfigError where that cannot be used."""

    def __call__(self, answered: Answered) -> float | dict[str, float]:
        """Score an episode. Any exception is a failure of this part."""
        raise NotImplementedError
