"""A reward by a model that was trained on preferences."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from ppojax.envs.rewards.part import Answered
from ppojax.envs.rewards.served import Served


class Preference(Served):
    """The score of a Bradley-Terry reward model for the whole conversation, asked over vLLM's pooling API.

    P(a better than b) = 1 / (1 + exp(r_b - r_a)) for scores r (Bradley and Terry 1952; arXiv 2203.02155, eq. 1). With
    `odds` the part's score is that probability against an answer of score `centre`, else r itself, which has no bounds.

    The request is `{model, messages}`. Of the reply's `data[0]`, the last number of `data`, `probs` or `score` counts:
    that of the last token, where there is one a token. `probs` are probabilities already: give `odds=false`.
    So far this was run against a stand-in only.
    """

    key: ClassVar[str] = "preference"
    decides: ClassVar[bool] = False  # an answer may be preferred and wrong

    url: str = Field(description="address that scores, such as http://localhost:8000/pooling")
    odds: bool = Field(default=True, description="the probability of being preferred to `centre`; false: the score r")
    centre: float = Field(default=0.0, description="score of the answer it is compared with")

    def __call__(self, answered: Answered) -> float:
        """Ask. Raises ServedError."""
        messages = [{name: m[name] for name in ("role", "content") if name in m} for m in answered.messages]
        score = self.ask("", {"messages": messages}, _number)
        if not self.odds:
            return score
        return 0.5 * (1.0 + math.tanh(0.5 * (score - self.centre)))  # the logistic function, without overflow


def _number(reply: Any) -> float:
    """Read the score. Raises ValueError."""
    try:
        scored = reply["data"][0]
        value = next(scored[name] for name in ("data", "probs", "score") if name in scored)
        while isinstance(value, list):
            value = value[-1]
        return float(value)
    except (LookupError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"expected data[0] with data, probs or score, got {reply!r:.80}") from error
