"""Plain Python functions as tools.

With `tools.py` in the current folder:

    def look_up(city: str, year: int = 2020) -> int:
        \"\"\"Give the population of a city.

        Args:
            city: its English name.
            year: year of the census.
        \"\"\"

and `tasks.jsonl` of lines such as `{"prompt": "How many people live in Oslo?", "answer": "709037"}`:

    env.type=tools env.functions=[tools.py:look_up] env.path=tasks.jsonl env.reward.numeric.weight=1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

from pydantic import Field

from ppojax.envs.base import Split, Task
from ppojax.envs.functions import Function, describe_function
from ppojax.envs.tool_loop import ToolSettings
from ppojax.envs.user_code import load_function
from ppojax.errors import ConfigError


class ToolEnv(ToolSettings):
    """Functions of your own as tools, over questions and answers from a file.

    They run in this process, each call in a thread: they can do whatever your program can, and one that runs out of
    time is left running. They keep nothing between calls unless they do so themselves; episodes share them.
    """

    type: Literal["tools"] = Field(default="tools", description="Python functions as tools, over a file of questions")
    functions: tuple[str, ...] = Field(min_length=1, description="module:function or folder/file.py:function, each")

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List the tasks of a split. Raises as `RecordSettings.tasks`, and ConfigError for the functions."""
        self.functions_by_name()
        return super().tasks(split, seed)

    def functions_by_name(self) -> Mapping[str, Function]:
        """Load the functions. Raises ConfigError."""
        return _load(self.functions)


@cache
def _load(paths: tuple[str, ...]) -> Mapping[str, Function]:
    key = "env.functions"
    loaded: dict[str, Function] = {}
    for path in paths:
        function = describe_function(load_function(path, key), f"{key}={path}")
        if function.name in loaded:
            raise ConfigError(f"{key}: two functions are called {function.name}, expected different names")
        loaded[function.name] = function
    return loaded
