"""A reward by the user's own function."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from pydantic import Field

from ppojax.envs.rewards.part import Answered, Part
from ppojax.envs.user_code import load_function
from ppojax.errors import ConfigError


class Function(Part):
    """The score that a Python function gives, such as `def score(completion, answer): return completion == answer`.

    It names the arguments that it wants: `completion` (the text of the last assistant turn), `extracted` (the answer
    found in it, None where there is none), `answer` (the reference), `messages` (the conversation), `record` (all that
    the task's source says). It returns a number, or a dict of numbers, which are added up and logged one by one.
    """

    path: str = Field(description="module:function or folder/file.py:function")

    def load(self) -> None:
        """Load the function. Raises ConfigError where it cannot be used."""
        _arguments(self.path)

    def __call__(self, answered: Answered) -> Any:
        """Call it; what it raises is a failure of this part."""
        known = vars(answered)
        return load_function(self.path, _KEY)(**{name: known[name] for name in _arguments(self.path)})


_KEY = "env.reward.function.path"
_KNOWN = tuple(Answered.__dataclass_fields__)


@cache
def _arguments(path: str) -> tuple[str, ...]:
    parameters = inspect.signature(load_function(path, _KEY)).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    unknown = [p.name for p in needed if p.name not in _KNOWN or p.kind not in by_name]
    if unknown:
        raise ConfigError(
            f"{_KEY}={path}: takes {', '.join(unknown)}; expected arguments by name, among {', '.join(_KNOWN)}"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return _KNOWN
    return tuple(p.name for p in parameters if p.name in _KNOWN)
