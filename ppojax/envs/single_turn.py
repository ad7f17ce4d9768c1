"""Episodes of one assistant turn: a prompt, an answer, a grade."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ppojax.envs.base import Reset, Step, Task
from ppojax.types import Messages


class SingleTurn:
    """One episode: `start` writes the prompt of a task, `grade` gives (reward, info) for the text of the answer."""

    def __init__(
        self,
        start: Callable[[Task], Messages],
        grade: Callable[[Task, Messages, str], tuple[float, dict[str, Any]]],
    ) -> None:
        self._start, self._grade = start, grade
        self._task: Task | None = None

    def reset(self, task: Task) -> Reset:
        """Write the prompt."""
        self._task = task
        entry = task.data.get("entry", task.data)  # of a record, or of a data set
        answer = entry.get("answer")
        return Reset(self._start(task), privileged="" if answer is None else str(answer))

    def step(self, message: dict[str, Any]) -> Step:
        """Grade the answer."""
        assert self._task is not None, "reset comes before step"
        reward, info = self._grade(self._task, [*self._start(self._task), message], message.get("content") or "")
        return Step([], reward, terminated=True, info=info)

    def close(self) -> None:
        """Hold nothing."""
