"""A two-turn tool task: call the calculator on the numbers that are asked for, then say what it gave."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, overload

from pydantic import Field, model_validator

from ppojax.component import Component
from ppojax.envs.arithmetic import ArithmeticSyntaxError, Operation, evaluate, parse
from ppojax.envs.base import Env, Reset, Step, Task
from ppojax.types import Messages

OPEN, CLOSE = "<calc>", "</calc>"
Split = Literal["train", "eval"]

# One in this many operand pairs is kept for evaluation.
_EVAL_SHARE = 8
# A range this small is searched for pairs of both splits; a larger one has them.
_SMALL_RANGE = 32
_NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
_ERROR = "error"


class Calculator(Component):
    """Two numbers are asked to be combined; a calculator is at hand as `<calc>a+b</calc>`.

    The call earns `reward_call` once, when its expression is exactly the question (either order where the operator
    commutes); the answer earns `reward_answer` when it comes after such a call and holds the result and no other
    number. A turn without a call is an answer and ends the episode.
    """

    has_expert: ClassVar[bool] = True
    stop: ClassVar[tuple[str, ...]] = (CLOSE,)

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
    system: str = Field("Use calc tags.", description="system message; empty for none")
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

    def make(self) -> Env:
        """Make an environment for one episode."""
        return CalculatorEnv(self)

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List tasks; each follows from split, seed and index alone, and no operand pair is in both splits."""
        size = self.train_size if split == "train" else self.eval_size
        return CalculatorTasks(self, split, seed, range(size))

    def expert(self, messages: Messages, task: Task) -> str:
        """Write what a perfect policy would write next."""
        last = messages[-1]
        if last["role"] == "tool" and last["content"] != _ERROR:
            return str(_result(task))
        return f"{OPEN}{question(task)}{CLOSE}"


class CalculatorTasks(Sequence[Task]):
    """Tasks by index, without a list of them."""

    def __init__(self, config: Calculator, split: Split, seed: int, numbers: range) -> None:
        self._config, self._seed, self._numbers = config, seed, numbers
        self._split: Split = split

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> CalculatorTasks: ...
    def __getitem__(self, index: int | slice) -> Task | CalculatorTasks:
        if isinstance(index, slice):
            return CalculatorTasks(self._config, self._split, self._seed, self._numbers[index])
        name = f"calculator/{self._split}/{self._seed}/{self._numbers[index]}"
        rng = random.Random(name)
        while True:
            a, b = (rng.randint(self._config.low, self._config.high) for _ in range(2))
            if _split(a, b) == self._split and self._config.example not in ((a, b), (b, a)):
                return Task(name, {"a": a, "b": b, "operator": rng.choice(self._config.operators)})


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
        system = [{"role": "system", "content": self._config.system}] if self._config.system else []
        return Reset([*system, *self._example(), self._ask(task)])

    def step(self, message: dict[str, Any]) -> Step:
        """Run the call in the message, or grade the message as the answer."""
        assert self._task is not None, "reset comes before step"
        self._turns += 1
        text = message.get("content") or ""
        if OPEN in text or CLOSE in text:
            return self._call(self._task, text)
        right = bool(self._info["call_ok"]) and answers(text, _result(self._task))
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
        call = {"role": "assistant", "content": f"{OPEN}{question(shown)}{CLOSE}"}
        if self._config.example_shows == "call":
            return [self._ask(shown), call]
        result = str(_result(shown))
        return [self._ask(shown), call, {"role": "tool", "content": result}, {"role": "assistant", "content": result}]

    def _call(self, task: Task, text: str) -> Step:
        reward, observation, right = 0.0, _ERROR, False
        try:
            expression = parse(call_text(text))
        except ArithmeticSyntaxError:
            self._info["malformed"] += 1
        else:
            observation = str(evaluate(expression))
            right = not self._info["call_ok"] and expression in _right_calls(task)
            self._info["wrong"] += not right
        if right:
            self._info["call_ok"] = True
            reward = self._config.reward_call
        # Turns are part of the task: after the last one nothing can be earned, so it terminates.
        if self._turns >= self._config.max_turns or (not right and self._config.on_wrong_call == "end"):
            return self._end(reward)
        return Step([{"role": "tool", "content": observation}], reward, info=dict(self._info))

    def _end(self, reward: float) -> Step:
        return Step([], reward, terminated=True, info=dict(self._info))


def question(task: Task) -> str:
    """Write the operation that a task asks for; a negative right operand stands in parentheses."""
    b = task.data["b"]
    return f"{task.data['a']}{task.data['operator']}{b if b >= 0 else f'({b})'}"


def call_text(text: str) -> str:
    """Cut the expression out of a message that ends with one call.

    Text may come before the call. Raises ArithmeticSyntaxError when there is another tag or text after the call.
    """
    before, _, rest = text.partition(OPEN)
    expression, closed, after = rest.partition(CLOSE)
    if not closed or after.strip() or CLOSE in before or OPEN in expression:
        raise ArithmeticSyntaxError("expected one call at the end of the message")
    return expression


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
    digest = hashlib.blake2b(f"{min(a, b)},{max(a, b)}".encode(), digest_size=4).digest()
    return "eval" if int.from_bytes(digest, "little") % _EVAL_SHARE == 0 else "train"
