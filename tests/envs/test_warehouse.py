"""The long walk: what is known of it is true."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from pydantic import ValidationError

from ppojax.envs import Step, Task, Warehouse
from ppojax.envs.warehouse import MOVES
from ppojax.models.tokenizer import char_tokenizer

TASK = Task("t", {"order": "ac", "aisle": "a-bca"})
SHORT = Warehouse(turns=5, kinds=4, ordered=2, system="")


def play(config: Warehouse, task: Task, *texts: str) -> list[Step]:
    env = config.make()
    env.reset(task)
    steps = [env.step({"role": "assistant", "content": text}) for text in texts]
    assert not any(step.terminated for step in steps[:-1]) and not any(step.truncated for step in steps)
    return steps


def test_an_episode() -> None:
    assert SHORT.make().reset(TASK).messages == [{"role": "user", "content": "ac\na"}]
    steps = play(SHORT, TASK, "take", "go", " go\n", "take", "take")
    assert [s.messages for s in steps] == [*([{"role": "tool", "content": c}] for c in "-bca"), []]
    assert [s.reward for s in steps] == [0, 0, 0, 0, 1]
    assert steps[-1].info == {"success": True, "right": 4, "wrong": 0, "malformed": 0}


def test_only_filled_shelves_decide_and_nothing_is_told_before_the_end() -> None:
    """Every sequence of moves: success where the four decisions at a shelf are right, the same observations in all."""
    seen, won = set(), []
    for moves in itertools.product(MOVES, repeat=5):
        steps = play(SHORT, TASK, *moves)
        seen.add(tuple(m["content"] for s in steps for m in s.messages))
        assert steps[-1].terminated and [s.reward for s in steps[:-1]] == [0] * 4
        if steps[-1].reward:
            assert steps[-1].info["success"]
            won.append(moves)
    assert seen == {("-", "b", "c", "a")}
    assert won == [("take", empty, "go", "take", "take") for empty in MOVES]


@pytest.mark.parametrize("text", ["", "Take", "take it", "takego", "go go", "a"])
def test_a_malformed_move_costs_its_turn(text: str) -> None:
    steps = play(SHORT, TASK, "take", text, "go", "go", "take")
    assert steps[1].messages == [{"role": "tool", "content": "error"}] and steps[1].info["malformed"] == 1
    assert (steps[-1].terminated, steps[-1].reward) == (True, 0.0)  # one bay short
    spared = play(SHORT.model_copy(update={"spare_turns": 1}), TASK, "take", text, "go", "go", "take", "take")
    assert spared[-1].reward == 1.0


def episode(config: Warehouse, task: Task, choose: Any) -> float:
    env = config.make()
    messages, total = list(env.reset(task).messages), 0.0
    for _ in range(config.max_turns):
        said = {"role": "assistant", "content": choose(messages)}
        step = env.step(said)
        messages += [said, *step.messages]
        total += step.reward
    assert step.terminated and step.info["success"] == (total == 1)
    return total


@pytest.mark.parametrize(
    "settings",
    [{"turns": 4}, {"turns": 64}, {"turns": 64, "shelves": 4}, {"turns": 8, "tool_format": "hermes", "spare_turns": 2}],
    ids=str,
)
def test_the_expert_always_succeeds(settings: dict[str, Any]) -> None:
    config = Warehouse(**settings)
    for task in config.tasks("train", 0)[:20]:
        assert task.data["aisle"].count("-") == config.turns - config.filled
        left = iter(range(config.max_turns))

        def choose(messages: Any, task: Task = task, left: Any = left) -> str:
            # It loses its spare turns first, and goes on after the errors.
            return "?" if next(left) < config.spare_turns else config.expert(messages, task)

        assert episode(config, task, choose) == 1.0


def test_how_often_guessing_succeeds() -> None:
    config = Warehouse(turns=8, shelves=3)
    rng, tasks = random.Random(0), config.tasks("train", 0)[:2000]
    won = sum(episode(config, task, lambda _: rng.choice(MOVES)) for task in tasks)
    assert config.success_rate(0.5) == 1 / 8
    assert won / 2000 == pytest.approx(1 / 8, abs=0.03)  # four standard deviations
    assert Warehouse(turns=64).success_rate(0.5) < 1e-19
    assert Warehouse(turns=64).success_rate(1.0) == 1.0


def test_half_the_items_are_ordered() -> None:
    """So that neither always taking nor never taking is better than guessing."""
    tasks = Warehouse(turns=32).tasks("train", 0)[:100]
    taken = [item in t.data["order"] for t in tasks for item in t.data["aisle"]]
    assert sum(taken) / len(taken) == pytest.approx(0.5, abs=0.04)


def test_no_task_is_in_both_splits() -> None:
    config = Warehouse(turns=4, kinds=4, ordered=1)

    def contents(split: Any, seed: int) -> set[tuple[str, str]]:
        return {(t.data["order"], t.data["aisle"]) for t in config.tasks(split, seed)[:400]}

    assert not (contents("train", 0) | contents("train", 1)) & (contents("eval", 0) | contents("eval", 1))
    assert len(contents("eval", 0)) > 20
    assert config.tasks("eval", 3)[5] == config.tasks("eval", 3)[2:9][3]


def test_calls_of_functions() -> None:
    config = SHORT.model_copy(update={"tool_format": "hermes"})
    reset = config.make().reset(TASK)
    assert [t["function"]["name"] for t in reset.tools] == list(MOVES)
    two = config.write("take") + config.write("go")
    steps = play(config, TASK, config.write("take"), "go", two, "<tool_call>{</tool_call>", config.write("run"))
    assert [s.messages[0]["content"] for s in steps[:-1]] == ["-", "error", "error", "error"]
    assert steps[0].messages[0]["name"] == "take" and steps[-1].info["malformed"] == 4


def test_64_turns_fit_into_a_row() -> None:
    """Characters as tokens: a turn costs at most 9, its observation included."""
    config, tokenizer = Warehouse(turns=64, system=""), char_tokenizer("abcdefghijklmnopqrstuvwxyz -\n")
    task = config.tasks("train", 0)[0]
    env = config.make()
    messages = list(env.reset(task).messages)
    for _ in range(64):
        said = {"role": "assistant", "content": config.expert(messages, task)}
        messages += [said, *env.step(said).messages]
    assert len(tokenizer.render(messages, add_generation_prompt=False)) < 64 * 9 + 10


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ordered": 8}, r"ordered \(8\) must be below kinds \(8\)"),
        ({"turns": 4, "shelves": 5}, r"shelves \(5\) must be at most turns \(4\)"),
        ({"tool_format": "calc"}, "tool_format calc names no function"),
        ({"turns": 3}, "greater than or equal to 4"),
        ({"kinds": 27}, "less than or equal to 26"),
    ],
)
def test_errors_of_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Warehouse(**settings)
