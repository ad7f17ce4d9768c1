"""The data sets of reasoning-gym: some hundred kinds of puzzles, made and graded by programs.

    env.type=reasoning_gym env.dataset=chain_sum env.options=[max_terms=3,max_digits=2]

needs `pip install ppojax[envs]`. Its documentation lists data sets and their options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, Literal

from pydantic import Field, field_validator

from ppojax.envs.answers import INSTRUCTIONS, AnswerFormat, extract, well_formed
from ppojax.envs.base import Env, EnvSettings, Split, Task, TasksByNumber, split_of
from ppojax.envs.single_turn import SingleTurn
from ppojax.envs.user_code import call_limited
from ppojax.errors import ConfigError, DataError
from ppojax.types import Messages

_ATTEMPTS = 500  # seeds tried for one task, until its question belongs to the split


class ReasoningGym(EnvSettings):
    """Questions of one reasoning-gym data set, answered in one turn.

    Each task is made from a seed of its own. One question in eight is held out, by its text: none is in both splits,
    whatever the seed. The reward is the data set's score of the extracted answer, or 0 below `floor`: some data sets
    give 0.01 or 0.05 to any answer. `info` says `score` as it was given, `form`, and `success`.
    """

    type: Literal["reasoning_gym"] = Field(default="reasoning_gym", description="puzzles of reasoning-gym")
    dataset: str = Field(description="name of the data set, such as chain_sum")
    options: tuple[str, ...] = Field(default=(), description="settings of the data set, such as [max_terms=3]")
    answer_format: AnswerFormat = Field(default="think_tags", description="where the answer is looked for")
    system: str | None = Field(
        default=None, description="system message; empty for none, null says how to answer, by answer_format"
    )
    floor: float = Field(default=0.1, ge=0, le=1, description="scores below this count as 0")
    success_at: float = Field(default=0.99, gt=0, le=1, description="score from which on an answer counts as right")
    reward_form: float = Field(default=0.0, description="added where the whole text has the form of answer_format")
    score_timeout_s: float = Field(default=10.0, gt=0, description="seconds that scoring may take; then the score is 0")
    train_size: int = Field(default=65_536, ge=1, description="number of training tasks")
    eval_size: int = Field(default=256, ge=1, description="number of evaluation tasks")

    @field_validator("options")
    @classmethod
    def _named(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [option for option in options if not option.partition("=")[0].isidentifier() or "=" not in option]:
            raise ValueError(f"{wrong[0]!r}: expected name=value")
        return options

    @property
    def max_turns(self) -> int:
        """One turn is an episode."""
        return 1

    @property
    def reward_range(self) -> tuple[float, float]:
        """Scores are from 0 to 1."""
        return min(self.reward_form, 0.0), 1.0 + max(self.reward_form, 0.0)

    def make(self) -> Env:
        """Make an environment for one episode."""
        return SingleTurn(self._prompt, self._grade)

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List tasks; each follows from split, seed and index alone, and no question is in both splits.

        Raises:
            ConfigError: reasoning-gym is not installed, or has no such data set or option.
            DataError: (from an item) the data set has too few questions for two splits.
        """
        _generator(self.dataset, self.options)
        size = self.train_size if split == "train" else self.eval_size
        return TasksByNumber(partial(self._task, f"{self.dataset}/{split}/{seed}", split), range(size))

    def _task(self, prefix: str, split: Split, number: int) -> Task:
        name = f"{prefix}/{number}"
        generate = _generator(self.dataset, self.options)
        for attempt in range(_ATTEMPTS):
            digest = hashlib.blake2b(f"{name}/{attempt}".encode(), digest_size=4).digest()
            entry = generate(int.from_bytes(digest, "little") >> 1)
            if split_of(entry["question"]) == split:
                return Task(name, {"entry": entry})
        raise DataError(
            f"task {name}: no question of this split in {_ATTEMPTS} seeds, expected more questions; widen env.options"
        )

    def _prompt(self, task: Task) -> Messages:
        system = INSTRUCTIONS[self.answer_format] if self.system is None else self.system
        said = [{"role": "system", "content": system}] if system else []
        return [*said, {"role": "user", "content": task.data["entry"]["question"]}]

    def _grade(self, task: Task, messages: Messages, text: str) -> tuple[float, dict[str, Any]]:
        answer, form = extract(text, self.answer_format), well_formed(text, self.answer_format)
        info: dict[str, Any] = {"score": 0.0, "form": float(form)}
        if answer is not None:
            dataset, entry = _create(self.dataset, self.options, 0), task.data["entry"]
            outcome = call_limited(lambda: float(dataset.score_answer(answer, entry)), self.score_timeout_s)
            # A scorer that raises was given something that it cannot read: that is no right answer.
            info["score"] = 0.0 if outcome.error else outcome.value
            info["failed"] = float(outcome.error is not None)
        info["success"] = info["score"] >= self.success_at
        reward = info["score"] if info["score"] >= self.floor else 0.0
        return reward + self.reward_form * form, info


@cache
def _generator(name: str, options: tuple[str, ...]) -> Callable[[int], dict[str, Any]]:
    """Make the function from a seed to an entry."""
    first = _create(name, options, 0)
    try:
        # Most data sets make item i of seed s from s + i, whatever their size: then one is enough.
        shifts = all(first[n]["question"] == _new(name, options, n)[0]["question"] for n in (1, 1009))
    except IndexError:
        shifts = False
    return first.__getitem__ if shifts else lambda seed: _new(name, options, seed)[0]


@cache
def _create(name: str, options: tuple[str, ...], seed: int) -> Any:
    try:
        return _new(name, options, seed)
    except ImportError as error:
        raise ConfigError(
            f"env.type=reasoning_gym: the package reasoning-gym cannot be imported ({error}): "
            "pip install 'ppojax[envs]'"
        ) from error
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"env.dataset={name}, env.options={list(options)}: {said:.200}{_advice(name)}") from error


def _new(name: str, options: tuple[str, ...], seed: int) -> Any:
    values = {key: _value(text) for key, _, text in (option.partition("=") for option in options)}
    return _factory().create_dataset(name, seed=seed, size=1, **values)


def _advice(name: str) -> str:
    names = _factory().DATASETS
    near = get_close_matches(name, names, 3, 0.0)
    return "" if name in names else f"; expected one of {len(names)} names, such as {', '.join(near)}"


def _factory() -> Any:
    import reasoning_gym.factory as factory  # pyright: ignore[reportMissingImports]

    return factory


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
