"""A long walk through a warehouse, for the study of credit assignment: dozens of decisions, one reward at the end.

    env.type=warehouse env.turns=32 env.shelves=8

The order is in the prompt. The policy walks past `turns` bays, one a turn, and at each says `take` or `go`; it sees
the next bay and nothing else. At the end it is paid once, if it took what was ordered and nothing more.

What is known exactly, so that a method can be measured against it:

- the optimal policy takes an item if and only if it is on the order, and always succeeds;
- only the turns at a filled shelf matter: with a right decision there with probability p, and every turn a move,
  success has probability p^shelves; guessing gives 2^-shelves (`success_rate`);
- then V(s) = p^(filled shelves still ahead) as long as every decision was right, and 0 from the first wrong one on. So
  the advantage is 0 at every empty bay, and in a lost episode the first mistake bears all of the blame.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ppojax.envs.base import Env, EnvSettings, Reset, Split, Step, Task, TasksByNumber, split_of
from ppojax.envs.tool_calls import ToolCall, tool_message
from ppojax.envs.tool_families import FAMILY_FORMATS, FamilyFormatName
from ppojax.types import Messages

MOVES = ("take", "go")
_EMPTY, _ERROR = "-", "error"
_ITEMS = "abcdefghijklmnopqrstuvwxyz"
_DESCRIPTIONS = ("Take what is on the shelf and walk on to the next bay.", "Leave it and walk on to the next bay.")
_RULES = (
    "You walk past the bays of a warehouse, one a turn. Take every item that is on the order, each time you see it, "
    "and no other. A bay without an item shows -. Reply with the move alone: take or go."
)


class Warehouse(EnvSettings):
    """An aisle of `turns` bays, `shelves` of them with an item; one in two items there is on the order.

    Moves are words (`take`, `go`), or, with another `tool_format`, calls of functions of these names. What is neither
    gets `error`, costs its turn and leaves the policy where it is: with `spare_turns` of 0 the end is then out of
    reach. Nothing but the last move of a right episode is paid. `info` counts `right`, `wrong` and `malformed`
    decisions at filled shelves.
    """

    has_expert: ClassVar[bool] = True

    type: Literal["warehouse"] = Field(default="warehouse", description="long walks with one reward at the end")
    turns: int = Field(default=16, ge=4, le=1024, description="bays of the aisle, one a turn")
    shelves: int | None = Field(
        default=None, ge=1, description="bays that hold an item, where the move matters; null for all of them"
    )
    spare_turns: int = Field(default=0, ge=0, description="turns that may be lost to malformed moves")
    kinds: int = Field(default=8, ge=4, le=26, description="different items")
    ordered: int = Field(default=3, ge=1, description="items on the order")
    reward: float = Field(default=1.0, description="reward of a right episode")
    tool_format: Literal["words"] | FamilyFormatName = Field(default="words", description="how moves are written")
    system: str = Field(default=_RULES, description="system message; empty for none")
    train_size: int = Field(default=65_536, ge=1, description="number of training tasks")
    eval_size: int = Field(default=256, ge=1, description="number of evaluation tasks")

    @model_validator(mode="after")
    def _usable(self) -> Warehouse:
        if self.ordered >= self.kinds:
            raise ValueError(f"ordered ({self.ordered}) must be below kinds ({self.kinds})")
        if self.filled > self.turns:
            raise ValueError(f"shelves ({self.shelves}) must be at most turns ({self.turns})")
        if self.tool_format == "calc":
            raise ValueError("tool_format calc names no function: expected another one")
        return self

    @property
    def filled(self) -> int:
        """Bays that hold an item."""
        return self.turns if self.shelves is None else self.shelves

    @property
    def max_turns(self) -> int:
        """Turns that an episode may take."""
        return self.turns + self.spare_turns

    @property
    def reward_range(self) -> tuple[float, float]:
        """What a right episode earns, or nothing."""
        return min(self.reward, 0.0), max(self.reward, 0.0)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a turn."""
        return () if self.tool_format == "words" else FAMILY_FORMATS[self.tool_format].stop

    def success_rate(self, right: float) -> float:
        """Probability of success of a policy that always moves, and decides rightly with this probability."""
        return right**self.filled

    def make(self) -> Env:
        """Make an environment for one episode."""
        return WarehouseEnv(self)

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List tasks; each follows from split, seed and index alone, and no order with its aisle is in both splits."""
        size = self.train_size if split == "train" else self.eval_size
        return TasksByNumber(partial(self._task, f"warehouse/{split}/{seed}", split), range(size))

    def expert(self, messages: Messages, task: Task) -> str:
        """Write the right move for the bay that is seen."""
        seen = next(m["content"] for m in reversed(messages) if m["role"] != "assistant" and m["content"] != _ERROR)
        return self.write("take" if seen[-1] in task.data["order"] else "go")

    def write(self, move: str) -> str:
        """Write a move as the policy would."""
        return move if self.tool_format == "words" else FAMILY_FORMATS[self.tool_format].write(ToolCall(move, {}))

    def read(self, text: str) -> str | None:
        """Read a move; None where it is none."""
        if self.tool_format == "words":
            move = text.strip()
        else:
            turn = FAMILY_FORMATS[self.tool_format].parse(text)
            move = turn.calls[0].name if len(turn.calls) == 1 and not turn.errors else ""
        return move if move in MOVES else None

    def _task(self, prefix: str, split: Split, number: int) -> Task:
        name = f"{prefix}/{number}"
        rng = random.Random(name)
        items = _ITEMS[: self.kinds]
        while True:
            order = "".join(sorted(rng.sample(items, self.ordered)))
            others = [item for item in items if item not in order]
            filled = set(rng.sample(range(self.turns), self.filled))
            aisle = "".join(
                rng.choice(rng.choice((list(order), others))) if n in filled else _EMPTY for n in range(self.turns)
            )
            if split_of(f"{order} {aisle}") == split:
                return Task(name, {"order": order, "aisle": aisle})


class WarehouseEnv:
    """One episode of `Warehouse`."""

    def __init__(self, config: Warehouse) -> None:
        self._config = config
        self._task: Task | None = None
        self._bay = self._turns = 0
        self._info: dict[str, Any] = {}

    def reset(self, task: Task) -> Reset:
        """Name the order, and show the first bay."""
        self._task, self._bay, self._turns = task, 0, 0
        self._info = {"success": False, "right": 0, "wrong": 0, "malformed": 0}
        system = [{"role": "system", "content": self._config.system}] if self._config.system else []
        asked = {"role": "user", "content": f"{task.data['order']}\n{task.data['aisle'][0]}"}
        tools = [] if self._config.tool_format == "words" else _schemas()
        return Reset([*system, asked], tools, privileged=task.data["aisle"])

    def step(self, message: dict[str, Any]) -> Step:
        """Make the move, and show the next bay."""
        assert self._task is not None, "reset comes before step"
        aisle = self._task.data["aisle"]
        self._turns += 1
        move = self._config.read(message.get("content") or "")
        if move is None:
            self._info["malformed"] += 1
        else:
            if (item := aisle[self._bay]) != _EMPTY:
                right = (move == "take") == (item in self._task.data["order"])
                self._info["right" if right else "wrong"] += 1
            self._bay += 1
        at_the_end = self._bay == len(aisle)
        if at_the_end or self._turns == self._config.max_turns:
            success = self._info["success"] = at_the_end and not self._info["wrong"]
            return Step([], self._config.reward if success else 0.0, terminated=True, info=dict(self._info))
        return Step([self._show(_ERROR if move is None else aisle[self._bay], move or "")], 0.0, info=dict(self._info))

    def close(self) -> None:
        """Hold nothing."""

    def _show(self, seen: str, move: str) -> dict[str, Any]:
        if self._config.tool_format == "words":
            return {"role": "tool", "content": seen}
        return tool_message(seen, 0, move)


def _schemas() -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {}}
    return [
        {"type": "function", "function": {"name": move, "description": text, "parameters": parameters}}
        for move, text in zip(MOVES, _DESCRIPTIONS, strict=True)
    ]
