"""Environments written for aviary (fhaviary): its task datasets, played by the policy.

    env.type=aviary env.dataset=my_tasks.py:Train env.eval_dataset=my_tasks.py:HeldOut env.max_turns=12

where each names a class or function without arguments that gives an aviary `TaskDataset` of known length. Needs
`pip install 'ppojax[aviary]'`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from functools import cache, partial
from typing import Any, Literal

from pydantic import Field

from ppojax.envs.base import Env, EnvSettings, Reset, Split, Step, Task, TasksByNumber, split_of
from ppojax.envs.output import shorten
from ppojax.envs.tool_calls import tool_message
from ppojax.envs.tool_families import FAMILY_FORMATS, FamilyFormatName
from ppojax.envs.user_code import load_function
from ppojax.errors import ConfigError, DataError
from ppojax.types import Messages


class Aviary(EnvSettings):
    """The environments of an aviary `TaskDataset`.

    Calls that cannot be read, or name no tool, are answered here with an error; the environment sees the others, and
    turns without a call. What it raises makes the episode an error. After `max_turns` turns the episode is truncated:
    aviary's environments know nothing of that limit. `success` is an episode that ended with a total reward of at least
    `success_at`.
    """

    type: Literal["aviary"] = Field(default="aviary", description="environments written for aviary")
    dataset: str = Field(description="module:name or folder/file.py:name of what makes the task dataset")
    eval_dataset: str | None = Field(
        default=None, description="the same for held-out tasks; null holds out one in eight of dataset"
    )
    tool_format: FamilyFormatName = Field(default="hermes", description="how calls are written")
    max_turns: int = Field(default=16, ge=1, description="assistant turns an episode may take")
    step_timeout_s: float = Field(default=60.0, gt=0, description="seconds that a reset or a step may take")
    max_output_chars: int = Field(default=4096, ge=256, description="characters of an observation, at most")
    success_at: float = Field(default=1.0, description="total reward from which on an episode is a success")

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a turn."""
        return FAMILY_FORMATS[self.tool_format].stop

    def make(self) -> Env:
        """Make an environment for one episode."""
        return AviaryEnv(self)

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List the tasks of a split, by their numbers in the dataset; the seed is not used.

        Raises:
            ConfigError: aviary is not installed, or a dataset cannot be made.
            DataError: one of the splits has no task.
        """
        _core()
        path = self.eval_dataset if split == "eval" and self.eval_dataset else self.dataset
        numbers = range(len(_dataset(path)))
        if self.eval_dataset is None:
            chosen = [n for n in numbers if split_of(str(n)) == split]
            numbers = range(len(chosen))
            make = partial(_task, path, chosen)
        else:
            make = partial(_task, path, numbers)
        if not numbers:
            raise DataError(f"{path}: no task to {split}, expected some; give env.eval_dataset, or more tasks")
        return TasksByNumber(make, numbers)


class AviaryEnv:
    """One episode of `Aviary`: its environment, and an event loop of its own."""

    def __init__(self, config: Aviary) -> None:
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._env: Any = None
        self._names: list[str] = []
        self._turns, self._total = 0, 0.0

    def reset(self, task: Task) -> Reset:
        """Start the task's environment."""
        self._turns, self._total = 0, 0.0
        self._env = _dataset(task.data["dataset"]).get_new_env_by_idx(task.data["number"])
        messages, tools = self._wait(self._env.reset())
        schemas = [tool.model_dump(mode="json", exclude_none=True, by_alias=True) for tool in tools]
        self._names = [schema["function"]["name"] for schema in schemas]
        return Reset(self._plain(messages), schemas)

    def step(self, message: dict[str, Any]) -> Step:
        """Let the environment answer."""
        self._turns += 1
        turn = FAMILY_FORMATS[self._config.tool_format].parse(message.get("content") or "")
        unknown = [c.name[:64] for c in turn.calls if c.name not in self._names]
        errors = [*turn.errors, *(f"error: no tool {n!r}, expected one of {', '.join(self._names)}" for n in unknown)]
        observed = [tool_message(error) for error in errors]
        reward, done, truncated = 0.0, False, False
        known = [c for c in turn.message().get("tool_calls", []) if c["function"]["name"] in self._names]
        if known or not errors:
            said = turn.message() | {"tool_calls": known}
            core = _core()
            action = core.ToolRequestMessage(**said) if known else core.Message(role="assistant", content=turn.content)
            messages, reward, done, truncated = self._wait(self._env.step(action))
            observed += self._plain(messages)
        self._total += reward
        cut = not done and (truncated or self._turns >= self._config.max_turns)
        info = {"turns": self._turns, "success": done and self._total >= self._config.success_at}
        return Step([] if done or cut else observed, float(reward), terminated=done, truncated=cut, info=info)

    def close(self) -> None:
        """Close the environment and its loop."""
        try:
            if self._env is not None:
                self._wait(self._env.close())
        finally:
            self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, self._config.step_timeout_s))

    def _plain(self, messages: Sequence[Any]) -> Messages:
        """Write messages in the shapes of the chat API, their texts cut."""
        plain = [m.model_dump(mode="json", exclude_none=True) for m in messages]
        return [m | {"content": shorten(str(m.get("content", "")), self._config.max_output_chars)} for m in plain]


def _task(path: str, numbers: Sequence[int], index: int) -> Task:
    return Task(f"{path}/{numbers[index]}", {"dataset": path, "number": numbers[index]})


@cache
def _dataset(path: str) -> Any:
    make = load_function(path, "env.dataset")
    try:
        dataset = make()
        len(dataset)
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"env.dataset={path}: gives no task dataset of known length ({type(error).__name__}: {said:.120})"
        ) from error
    return dataset


def _core() -> Any:
    try:
        import aviary.core as core  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"env.type=aviary: the package fhaviary cannot be imported ({error}): pip install 'ppojax[aviary]'"
        ) from error
    return core
