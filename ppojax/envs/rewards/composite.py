"""The sum of the parts, each of them logged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pydantic import Field, model_validator

from ppojax.component import Component
from ppojax.envs.rewards.function import Function
from ppojax.envs.rewards.judge import Judge
from ppojax.envs.rewards.part import Answered, Part
from ppojax.envs.rewards.preference import Preference
from ppojax.envs.rewards.rules import Exact, Form, Language, Length, Numeric
from ppojax.envs.rewards.served import Served
from ppojax.envs.user_code import call_limited


class Rewards(Component):
    """The reward of an answer: the sum of weight times score over the parts that are given.

    `info` gets `reward/<part>` for every part, before weights. `success` is that every part which judges the answer
    itself (exact, numeric, function, judge) scores at least `success_at`; where there is none of these, that every
    part does.

    A part that raises, returns no finite number, or takes longer than `timeout_s` has failed. Then the episode is an
    error, counted as `error/<type of the exception>` and out of the loss; or, with `failed_score`, the part has that
    score and `info` gets `failed/<part>` of 1.
    """

    exact: Exact | None = Field(default=None, description="is the answer the reference, as text")
    numeric: Numeric | None = Field(default=None, description="is the answer the reference, as a number")
    form: Form | None = Field(default=None, description="is the text written as asked for")
    language: Language | None = Field(default=None, description="is the text in one language's script")
    length: Length | None = Field(default=None, description="punishment of long answers")
    function: Function | None = Field(default=None, description="a Python function of your own")
    judge: Judge | None = Field(default=None, description="a language model behind an OpenAI-compatible address")
    preference: Preference | None = Field(default=None, description="a reward model behind an address (Bradley-Terry)")
    success_at: float = Field(default=1.0, description="score from which on an answer counts as right")
    timeout_s: float = Field(default=30.0, gt=0, description="seconds that function, judge and preference may take")
    failed_score: float | None = Field(
        default=None, description="score of a part that fails; null makes its episode an error"
    )

    @model_validator(mode="after")
    def _some(self) -> Rewards:
        if not any(self._parts()):
            names = [n for n, f in type(self).model_fields.items() if f.default is None and n != "failed_score"]
            raise ValueError(
                f"there is no reward: give one or more of {', '.join(names)}, such as env.reward.exact.weight=1"
            )
        return self

    def load(self) -> None:
        """Load what the parts need from outside. Raises ConfigError where it cannot be used."""
        for _, part in self._parts():
            part.load()

    def grade(self, answered: Answered) -> tuple[float, dict[str, Any]]:
        """Give the reward and the info of an episode. Raises what a failing part raised."""
        total, info, deciding, others = 0.0, {}, [], []
        for name, part in self._parts():
            score = self._score(name, part, answered, info)
            info[f"reward/{name}"] = score
            total += part.weight * score
            (deciding if part.decides else others).append(score)
        info["success"] = all(score >= self.success_at for score in deciding or others)
        return total, info

    def _score(self, name: str, part: Part, answered: Answered, info: dict[str, Any]) -> float:
        """Score one part; what a part gives by name is logged by name, and its sum is the score."""
        outside = isinstance(part, Function | Served | Numeric)
        outcome = call_limited(lambda: _numbers(name, part(answered)), self.timeout_s if outside else None)
        if self.failed_score is not None:
            info[f"failed/{name}"] = float(outcome.error is not None)
            if outcome.error is not None:
                return self.failed_score
        scores = outcome.unwrap()
        info.update({f"reward/{label}": score for label, score in scores.items()})
        return sum(scores.values())

    def _parts(self) -> Iterator[tuple[str, Part]]:
        return ((name, part) for name, part in self if isinstance(part, Part))


def _numbers(name: str, score: Any) -> dict[str, float]:
    """Check what a part gave."""
    scores = {f"{name}/{k}": v for k, v in score.items()} if isinstance(score, dict) else {name: score}
    for label, value in scores.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{label}: expected a finite number, got {value!r:.40}")
    return {label: float(value) for label, value in scores.items()}
