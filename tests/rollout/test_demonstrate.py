"""Demonstrations: the expert's own words, as rows."""

from __future__ import annotations

import numpy as np
import pytest

from ppojax.envs import Calculator
from ppojax.models.tokenizer import char_tokenizer
from ppojax.rollout.demonstrate import demonstrate
from ppojax.types import Ending, Row

ENV = Calculator(example=(23, 45))
TOKENIZER = char_tokenizer("".join(map(chr, range(32, 127))))
TASKS = list(ENV.tasks("train", 0)[:12])


def rows(wrong: float, seed: int = 0, env: Calculator = ENV) -> list[Row]:
    return demonstrate(env, TOKENIZER, TASKS, wrong=wrong, rng=np.random.default_rng(seed))


def test_the_expert_earns_everything() -> None:
    for task, row in zip(TASKS, rows(0.0), strict=True):
        a, b = task.data["a"], task.data["b"]
        said = [m["content"] for m in row.messages if m["role"] == "assistant"][1:]  # after the example
        assert said == [f"<calc>{a}+{b}</calc>", str(a + b)]
        assert row.ending == Ending.TERMINATED and row.info["success"] and row.reward.sum() == 1.0
        # One conversation as the template writes it; the policy's are the expert's words and the last eos.
        assert row.token.tolist() == TOKENIZER.render(row.messages, add_generation_prompt=False)
        actions = [*TOKENIZER.encode("".join(said)), TOKENIZER.eos_ids[0]]
        assert row.token[row.action].tolist() == actions
        assert not row.logp_behavior.any() and row.action[row.reward > 0].all()


@pytest.mark.parametrize(("wrong", "expected"), [(1.0, 0.0), (0.5, 0.25)])
def test_a_share_of_turns_is_wrong(wrong: float, expected: float) -> None:
    success = [row.info["success"] for seed in range(20) for row in rows(wrong, seed)]
    # Two turns have to be right, each with 1 - wrong, and another's words are right by chance, 1 in 12 (itself).
    # 240 rows: three deviations of their share are 0.1.
    assert expected <= np.mean(success) + 0.1 and np.mean(success) < expected + 0.2


def test_they_follow_from_the_generator() -> None:
    a, b, other = rows(0.5, 1), rows(0.5, 1), rows(0.5, 2)
    assert [r.token.tolist() for r in a] == [r.token.tolist() for r in b] != [r.token.tolist() for r in other]


def test_turns_that_never_end_are_truncated() -> None:
    """An expert that keeps calling is stopped after max_turns, with all its turns in the row."""

    class Endless(Calculator):
        def expert(self, messages: list, task: object) -> str:
            return super().expert(messages[:1], task)  # pyright: ignore[reportArgumentType]

    row = demonstrate(
        Endless(example=(23, 45), max_turns=3), TOKENIZER, TASKS[:1], wrong=0.0, rng=np.random.default_rng(0)
    )[0]
    assert row.info["wrong"] == 2 and sum(m["role"] == "assistant" for m in row.messages) == 4
