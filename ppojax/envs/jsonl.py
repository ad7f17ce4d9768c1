"""Questions from a file, answered in one turn.

    env.type=jsonl env.path=train.jsonl env.prompt_field=question env.reward.numeric.weight=1

with lines such as `{"question": "What is 12 + 45?", "answer": "57"}`, or with a function of your own:

    env.type=jsonl env.path=train.jsonl env.reward.function.path=my_rewards.py:score
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.envs.base import Env
from ppojax.envs.records import RecordSettings
from ppojax.envs.single_turn import SingleTurn


class JsonLines(RecordSettings):
    """Prompts and answers from a file with one JSON object a line; one assistant turn, graded by `reward`."""

    type: Literal["jsonl"] = Field(default="jsonl", description="questions and answers from a file")

    @property
    def max_turns(self) -> int:
        """One turn is an episode."""
        return 1

    def make(self) -> Env:
        """Make an environment for one episode."""
        return SingleTurn(self.prompt, self.grade)
