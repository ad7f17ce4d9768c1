"""Rewards by rule: the answer itself, its form, its language and its length."""

from __future__ import annotations

import unicodedata
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ppojax.envs.answers import AnswerFormat, number, well_formed
from ppojax.envs.rewards.part import Answered, Part
from ppojax.errors import ConfigError

Script = Literal["latin", "cyrillic", "greek", "cjk", "hiragana", "hangul", "arabic", "hebrew", "devanagari"]


class Exact(Part):
    """1 where the answer is the reference, else 0; white space counts as one space. A list holds alternatives."""

    ignore_case: bool = Field(default=False, description="compare without regard to case")

    def __call__(self, answered: Answered) -> float:
        """Compare the extracted answer with the reference."""
        if answered.extracted is None:
            return 0.0
        return float(self._plain(answered.extracted) in map(self._plain, _alternatives(answered)))

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


class Numeric(Part):
    """1 where the answer has the reference's value, else 0: `0.5`, `1/2` and `50%` are the same.

    |answer - reference| <= max(tolerance, relative_tolerance |reference|), computed exactly. With
    `backend=math_verify` expressions and sets in LaTeX are compared too, by the package math-verify.
    """

    tolerance: float = Field(default=0.0, ge=0, description="largest difference from the reference")
    relative_tolerance: float = Field(default=0.0, ge=0, description="the same as a share of the reference")
    backend: Literal["plain", "math_verify"] = Field(
        default="plain", description="plain: numbers; math_verify: LaTeX too, needs `pip install ppojax[envs]`"
    )

    def load(self) -> None:
        """Find the backend. Raises ConfigError where it is not installed."""
        if self.backend == "math_verify":
            _math_verify()

    def __call__(self, answered: Answered) -> float:
        """Compare the extracted answer with the reference. Raises ValueError where no reference is a number."""
        references = _alternatives(answered)
        if answered.extracted is None:
            return 0.0
        if self.backend == "math_verify":
            return float(any(_verified(reference, answered.extracted) for reference in references))
        values = [value for value in map(number, references) if value is not None]
        if not values:
            raise ValueError(f"the reference {references!r:.80} is not a number")
        given = number(answered.extracted)
        return float(given is not None and any(self._near(given, value) for value in values))

    def _near(self, given: Fraction, value: Fraction) -> bool:
        allowed = max(Fraction(self.tolerance), Fraction(self.relative_tolerance) * abs(value))
        return abs(given - value) <= allowed


class Form(Part):
    """1 where the whole text has the form that is asked for, else 0."""

    decides: ClassVar[bool] = False

    style: AnswerFormat = Field(default="think_tags", description="the form, as for env.answer_format")

    def __call__(self, answered: Answered) -> float:
        """Match the last assistant turn."""
        return float(well_formed(answered.completion, self.style))


class Language(Part):
    """Share of the letters, thinking included, that are of one script (1 where there are no letters).

    After the language consistency reward of DeepSeek-R1 (arXiv 2501.12948, section 2.3.2), which counts words; letters
    need no word boundaries.
    """

    decides: ClassVar[bool] = False

    script: Script = Field(default="latin", description="script that the text should be written in")

    def __call__(self, answered: Answered) -> float:
        """Count the letters of the last assistant turn."""
        letters = [c for c in answered.completion if c.isalpha()]
        ours = sum(unicodedata.name(c, "").startswith(self.script.upper()) for c in letters)
        return ours / len(letters) if letters else 1.0


class Length(Part):
    """Soft punishment of overlong answers (DAPO, arXiv 2503.14476, eq. 13), in tokens of the policy.

    0 up to `limit - margin`, then falling on a line to -1 at `limit`, and -1 beyond. Counted is what the policy wrote
    in the whole episode, by the `tokens` of its messages (see `Env.step`); a turn in the prompt has none.
    """

    decides: ClassVar[bool] = False

    limit: int = Field(default=20_480, ge=1, description="tokens of all assistant turns from which on it is -1")
    margin: int = Field(default=4_096, ge=1, description="tokens before the limit over which it falls")

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.margin > self.limit:
            raise ValueError(f"margin ({self.margin}) must be at most limit ({self.limit})")
        return self

    def __call__(self, answered: Answered) -> float:
        """Count what the policy wrote in the whole episode."""
        own = sum(m.get("tokens", 0) for m in answered.messages if m["role"] == "assistant")
        over = own - (self.limit - self.margin)
        return -min(max(over / self.margin, 0.0), 1.0)


def _alternatives(answered: Answered) -> list[str]:
    answer = answered.answer
    return [str(a) for a in answer] if isinstance(answer, list | tuple) else [str(answer)]


def _math_verify() -> Any:
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "env.reward.numeric.backend=math_verify: the package math-verify is missing: pip install 'ppojax[envs]'"
        ) from error
    return math_verify


def _verified(reference: str, given: str) -> bool:
    # Its own time limits use signals, which only work in the main thread; the composite has one.
    gold, target = (
        _math_verify().parse(text if "\\" in text or "$" in text else f"${text}$", parsing_timeout=None)
        for text in (reference, given)
    )
    return bool(_math_verify().verify(gold, target, timeout_seconds=None))
