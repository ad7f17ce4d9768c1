"""A two-turn tool task: call the calculator on the numbers that are asked for, then say what it gave."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ppojax.envs.arithmetic import ArithmeticSyntaxError, Operation, evaluate, parse
from ppojax.envs.base import Env, EnvSettings, Reset, Split, Step, Task, TasksByNumber, split_of
from ppojax.envs.tool_calls import TOOL_FORMATS, ParsedTurn, ToolCall, ToolFormatName, tool_message
from ppojax.types import Messages

# A range this small is searched for pairs of both splits; a larger one has them.
_SMALL_RANGE = 32
_NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
_ERROR = "error"
_CALC = "calc"
_INSTRUCTIONS: dict[ToolFormatName, str] = {
    "calc": "Use calc tags.",
    "hermes": "Use the calc function.",
    "harmony": "Use the calc function.",
}
_SCHEMA = {
    "type": "function",
    "function": {
        "name": _CALC,
        "description": "Compute with whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "such as 12+34"}},
            "required": ["expression"],
        },
    },
}


class Calculator(EnvSettings):
    """Two numbers are asked to be combined; a calculator is at hand as `<calc>a+b</calc>`.

    With `tool_format=hermes` the calculator is the function `calc(expression)`, which the chat template announces and
    which is called as `<tool_call>{"name": "calc", "arguments": {"expression": "a+b"}}</tool_call>`; thinking before
    `</think>` is not graded. With `tool_format=harmony` it is called as gpt-oss calls functions.

    The call earns `reward_call` once, when its expression is exactly the question (either order where the operator
    commutes); the answer earns `reward_answer` when it comes after such a call and holds the result and no other
    number. A turn without a call is an answer and ends the episode.
    """

    has_expert: ClassVar[bool] = True

    type: Literal["calculator"] = Field(default="calculator", description="two-turn arithmetic with a calculator")
    operators: tuple[Literal["+", "-", "*"], ...] = Field(
        default=("+",), min_length=1, description="operators that are asked"
    )
    low: int = Field(default=10, ge=-(10**9), le=10**9, description="smallest operand")
    high: int = Field(default=99, ge=-(10**9), le=10**9, description="largest operand")
    reward_call: float = Field(default=0.5, description="reward of the right call")
    reward_answer: float = Field(default=0.5, description="reward of the right answer after the right call")
    on_wrong_call: Literal["observe", "end"] = Field(
        default="observe", description="after a malformed or wrong call: answer with an error or its result, or end"
    )
    max_turns: int = Field(default=2, ge=1, description="turns an episode may take; the last one terminates it")
    train_size: int = Field(default=65_536, ge=1, description="number of training tasks")
    eval_size: int = Field(default=256, ge=1, description="number of evaluation tasks")
    tool_format: ToolFormatName = Field(
        default="calc", description="how calls are written: calc tags, Hermes JSON, or gpt-oss"
    )
    system: str | None = Field(
        default=None, description="system message; null for one that fits tool_format, empty for none"
    )
    prompt: str = Field(
        "{question}=?", description="user message; {question} becomes the two numbers and their operator"
    )
    example: tuple[int, int] | None = Field(
        (23, 45), description="operands of one call shown as a turn before the question; these are never asked"
    )

    example_shows: Literal["call", "exchange"] = Field(
        default="call", description="call: the example ends with the call; exchange: it goes on to result and answer"
    )

    @model_validator(mode="after")
    def _usable(self) -> Calculator:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must be at most high ({self.high})")
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt ({self.prompt!r:.40}) must contain {{question}}")
        if len(set(self.operators)) < len(self.operators):
            raise ValueError(f"operators ({self.operators}) must not repeat")
        if self.high - self.low < _SMALL_RANGE:
            numbers = range(self.low, self.high + 1)
            if len({_split(a, b) for a in numbers for b in numbers}) < 2:
                raise ValueError(
                    f"low ({self.low}) to high ({self.high}) has too few pairs for a training and an evaluation "
                    "split: widen the range"
                )
        return self

    @property
    def reward_range(self) -> tuple[float, float]:
        """Each part is earned once at most."""
        parts = (self.reward_call, self.reward_answer)
        return sum(min(part, 0.0) for part in parts), sum(max(part, 0.0) for part in parts)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a turn."""
        return TOOL_FORMATS[self.tool_format].stop

    def call(self, expression: str) -> str:
        """Write a call of the calculator."""
        return TOOL_FORMATS[self.tool_format].write(ToolCall(_CALC, {"expression": expression}))

    def make(self) -> Env:
        """Make an environment for one episode."""
        return CalculatorEnv(self)

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List tasks; each follows from split, seed and index alone, and no operand pair is in both splits."""
        size = self.train_size if split == "train" else self.eval_size
        return TasksByNumber(partial(self._task, f"calculator/{split}/{seed}", split), range(size))

    def _task(self, prefix: str, split: Split, number: int) -> Task:
        name = f"{prefix}/{number}"
        rng = random.Random(name)
        while True:
            a, b = (rng.randint(self.low, self.high) for _ in range(2))
            if _split(a, b) == split and self.example not in ((a, b), (b, a)):
                return Task(name, {"a": a, "b": b, "operator": rng.choice(self.operators)})

    def expert(self, messages: Messages, task: Task) -> str:
        """Write what a perfect policy would write next."""
        last = messages[-1]
        if last["role"] == "tool" and not last["content"].startswith(_ERROR):
            return TOOL_FORMATS[self.tool_format].answer(str(_result(task)))
        return self.call(question(task))


class CalculatorEnv:
    """One episode of `Calculator`.

    `info` counts the calls that were `malformed` or `wrong`, and says `call_ok`, `answer_ok` and `success` (both).
    """

    def __init__(self, config: Calculator) -> None:
        self._config = config
        self._task: Task | None = None
        self._turns = 0
        self._info: dict[str, Any] = {}

    def reset(self, task: Task) -> Reset:
        """Ask the question, after one example of a call."""
        self._task, self._turns = task, 0
        self._info = {"success": False, "call_ok": False, "answer_ok": False, "malformed": 0, "wrong": 0}
        told = _INSTRUCTIONS[self._config.tool_format] if self._config.system is None else self._config.system
        system = [{"role": "system", "content": told}] if told else []
        tools = [] if self._config.tool_format == "calc" else [_SCHEMA]
        return Reset([*system, *self._example(), self._ask(task)], tools, privileged=str(_result(task)))

    def step(self, message: dict[str, Any]) -> Step:
        """Run the call in the message, or grade the message as the answer."""
        assert self._task is not None, "reset comes before step"
        self._turns += 1
        turn = TOOL_FORMATS[self._config.tool_format].parse(message.get("content") or "")
        if turn.has_call:
            return self._call(self._task, turn)
        right = bool(self._info["call_ok"]) and answers(turn.content, _result(self._task))
        self._info["answer_ok"] = self._info["success"] = right
        return self._end(self._config.reward_answer if right else 0.0)

    def close(self) -> None:
        """Hold nothing."""

    def _ask(self, task: Task) -> dict[str, Any]:
        return {"role": "user", "content": self._config.prompt.replace("{question}", question(task))}

    def _example(self) -> Messages:
        if self._config.example is None:
            return []
        a, b = self._config.example
        shown = Task("example", {"a": a, "b": b, "operator": self._config.operators[0]})
        call = TOOL_FORMATS[self._config.tool_format].message(ToolCall(_CALC, {"expression": question(shown)}))
        if self._config.example_shows == "call":
            return [self._ask(shown), call]
        result = str(_result(shown))
        return [self._ask(shown), call, self._observe(result), {"role": "assistant", "content": result}]

    def _call(self, task: Task, turn: ParsedTurn) -> Step:
        reward, all_right, observations = 0.0, not turn.errors, list(turn.errors)
        self._info["malformed"] += len(turn.errors)
        for call in turn.calls:
            observation, right = self._run(task, call)
            observations.append(observation)
            all_right &= right
            reward += self._config.reward_call if right else 0.0
        # Turns are part of the task: after the last one nothing can be earned, so it terminates.
        if self._turns >= self._config.max_turns or (not all_right and self._config.on_wrong_call == "end"):
            return self._end(reward)
        return Step([self._observe(o, n) for n, o in enumerate(observations)], reward, info=dict(self._info))

    def _run(self, task: Task, call: ToolCall) -> tuple[str, bool]:
        """Run a call: what it gives, and whether it is the first right one."""
        expression = call.arguments.get("expression")
        if call.name != _CALC or not isinstance(expression, str):
            self._info["malformed"] += 1
            return f'{_ERROR}: expected {_CALC} with "expression", a text', False
        try:
            parsed = parse(expression)
        except ArithmeticSyntaxError:
            self._info["malformed"] += 1
            return _ERROR, False
        right = not self._info["call_ok"] and parsed in _right_calls(task)
        self._info["wrong"] += not right
        self._info["call_ok"] |= right
        return str(evaluate(parsed)), right

    def _observe(self, content: str, number: int = 0) -> dict[str, Any]:
        if self._config.tool_format == "calc":
            return {"role": "tool", "content": content}
        return tool_message(content, number, _CALC)

    def _end(self, reward: float) -> Step:
        return Step([], reward, terminated=True, info=dict(self._info))


def question(task: Task) -> str:
    """Write the operation that a task asks for; a negative right operand stands in parentheses."""
    b = task.data["b"]
    return f"{task.data['a']}{task.data['operator']}{b if b >= 0 else f'({b})'}"


def answers(text: str, result: int) -> bool:
    """Decide whether the only number in a text is the result.

    "57", "It is 57." and "1,024" count; "12+45=57", "57.0", "057" and "57 or 58" do not: a text that repeats the
    question or lists candidates must not score.
    """
    numbers = _NUMBER.findall(text.replace("\u2212", "-"))
    return [n.replace(",", "") for n in numbers] == [str(result)]


def _result(task: Task) -> int:
    return evaluate(Operation(task.data["operator"], task.data["a"], task.data["b"]))


def _right_calls(task: Task) -> list[Operation]:
    a, b, operator = task.data["a"], task.data["b"], task.data["operator"]
    return [Operation(operator, a, b)] + ([] if operator == "-" else [Operation(operator, b, a)])


def _split(a: int, b: int) -> Split:
    # The order does not matter: 12+45 is not held out when 45+12 is trained on.
    return split_of(f"{min(a, b)},{max(a, b)}")
