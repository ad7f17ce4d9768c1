"""Episodes with tools: the policy calls functions until it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ppojax.envs.base import Env, Reset, Step, Task
from ppojax.envs.functions import ArgumentsError, Function
from ppojax.envs.output import shorten
from ppojax.envs.records import RecordSettings
from ppojax.envs.tool_calls import ToolCall, tool_message
from ppojax.envs.tool_families import FAMILY_FORMATS, UNTYPED, FamilyFormatName
from ppojax.envs.user_code import call_limited
from ppojax.types import Messages


class ToolSettings(RecordSettings):
    """What environments share that answer calls of functions.

    A turn with calls gets their results, one message each; a turn without is the answer, which `reward` grades. A call
    that cannot be read, names no function, or has wrong arguments gets an error as its result, and so does one that
    raises or runs out of time. Results are given as text: special tokens in them are spelled out by the tokenizer and
    never parsed. After `max_turns` turns the episode is over without an answer, and earns nothing.
    """

    own_process: ClassVar[bool] = False  # calls end by themselves, and raise only where the environment has failed

    tool_format: FamilyFormatName = Field(default="hermes", description="how calls are written")
    max_turns: int = Field(default=8, ge=1, description="assistant turns an episode may take, the answer included")
    call_timeout_s: float = Field(default=10.0, gt=0, description="seconds that one call may take")
    max_output_chars: int = Field(
        default=4096, ge=256, description="characters of a result, at most; the middle of a longer one is left out"
    )

    @field_validator("tool_format")
    @classmethod
    def _names_functions(cls, tool_format: FamilyFormatName) -> FamilyFormatName:
        if tool_format == "calc":
            raise ValueError("calc tags name no function, expected another format, such as hermes")
        return tool_format

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a turn."""
        return FAMILY_FORMATS[self.tool_format].stop

    def functions_by_name(self) -> Mapping[str, Function]:
        """Load the functions. Raises ConfigError."""
        raise NotImplementedError

    def make(self) -> Env:
        """Make an environment for one episode."""
        return ToolLoop(self, self.functions_by_name())


class ToolLoop:
    """One episode of `ToolSettings`.

    `info` counts `calls`, those that were `malformed`, that `failed` (raised or ran out of time), and `turns`; the last
    step adds what the reward says, and `success`.
    """

    def __init__(self, config: ToolSettings, functions: Mapping[str, Function]) -> None:
        self._config, self._functions = config, functions
        self._task: Task | None = None
        self._messages: Messages = []
        self._info: dict[str, Any] = {}

    def reset(self, task: Task) -> Reset:
        """Write the prompt, and announce the functions."""
        self._task, self._messages = task, self._config.prompt(task)
        self._info = {"success": False, "turns": 0, "calls": 0, "malformed": 0, "failed": 0}
        answer = task.data.get("answer")
        schemas = [f.schema for f in self._functions.values()]
        return Reset(list(self._messages), schemas, privileged="" if answer is None else str(answer))

    def step(self, message: dict[str, Any]) -> Step:
        """Run the calls in the message, or grade it as the answer."""
        assert self._task is not None, "reset comes before step"
        self._messages.append(message)
        self._info["turns"] += 1
        turn = FAMILY_FORMATS[self._config.tool_format].parse(message.get("content") or "")
        if not turn.has_call:
            reward, info = self._config.grade(self._task, self._messages, turn.content)
            return Step([], reward, terminated=True, info={**self._info, **info})
        self._info["calls"] += len(turn.calls) + len(turn.errors)
        self._info["malformed"] += len(turn.errors)
        # Turns are part of the task: after the last one nothing can be earned, so it terminates, and runs nothing.
        if self._info["turns"] >= self._config.max_turns:
            return Step([], 0.0, terminated=True, info=dict(self._info))
        results = [*((error, "") for error in turn.errors), *((self._run(call), call.name) for call in turn.calls)]
        limit = self._config.max_output_chars
        observed = [tool_message(shorten(text, limit), n, name[:64]) for n, (text, name) in enumerate(results)]
        self._messages += observed
        return Step(observed, 0.0, info=dict(self._info))

    def close(self) -> None:
        """Hold nothing."""

    def _run(self, call: ToolCall) -> str:
        function = self._functions.get(call.name)
        if function is None:
            self._info["malformed"] += 1
            return f"error: no function {call.name[:64]!r}, expected one of {', '.join(self._functions)}"
        try:
            arguments = function.bind(call.arguments, typed=self._config.tool_format not in UNTYPED)
        except ArgumentsError as error:
            self._info["malformed"] += 1
            return f"error: {error}"
        if self._config.own_process:
            return _text(function.call(**arguments))
        outcome = call_limited(lambda: _text(function.call(**arguments)), self._config.call_timeout_s)
        if outcome.error is None:
            return outcome.value
        self._info["failed"] += 1
        return f"error: {type(outcome.error).__name__}: {outcome.error}"


def _text(result: Any) -> str:
    """Write a result: texts as they are, anything else as JSON where that can be done."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(result)
