"""Puzzles of reasoning-gym: of a stand-in with known questions, and of the package where it is installed."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from ppojax.envs import ReasoningGym, Task, reasoning_gym
from ppojax.errors import ConfigError, DataError


class Sums:
    """Item i is made from seed + i."""

    def __init__(self, seed: int, size: int, top: int = 999) -> None:
        self.seed, self.top = seed, top

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(self.seed + index)
        a, b = (rng.randint(0, self.top) for _ in range(2))
        return {"question": f"{a} + {b}?", "answer": str(a + b), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return 1.0 if int(answer) == int(entry["answer"]) else 0.01


class Listed(Sums):
    """As many items as its size, made from the seed alone."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index:
            raise IndexError
        return super().__getitem__(index)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type]]:
    known = {"sums": Sums, "listed": Listed}
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")

    def create_dataset(name: str, **config: Any) -> Any:
        if name not in known:
            raise ValueError(f"Dataset '{name}' not\nregistered")
        return known[name](**config)

    vars(factory).update(create_dataset=create_dataset, DATASETS=known)
    vars(package).update(factory=factory)
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    for cached in (reasoning_gym._create, reasoning_gym._generator):
        cached.cache_clear()
    yield known
    for cached in (reasoning_gym._create, reasoning_gym._generator):
        cached.cache_clear()


def play(config: ReasoningGym, task: Task, text: str) -> tuple[float, dict[str, Any]]:
    env = config.make()
    env.reset(task)
    step = env.step({"role": "assistant", "content": text})
    assert step.terminated
    return step.reward, step.info


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("dataset", ["sums", "listed"])
def test_no_question_is_in_both_splits(dataset: str) -> None:
    config = ReasoningGym(dataset=dataset, options=("top=40",))

    def questions(split: Any, seed: int, n: int) -> list[str]:
        return [t.data["entry"]["question"] for t in config.tasks(split, seed)[:n]]

    train, held_out = questions("train", 0, 300), questions("eval", 0, 200)
    assert not set(train + questions("train", 1, 300)) & set(held_out + questions("eval", 1, 200))
    assert train == questions("train", 0, 300) != questions("train", 1, 300)
    assert len(set(held_out)) > 15 and len(config.tasks("eval", 0)) == 256
    assert config.tasks("train", 5)[7] == config.tasks("train", 5)[3:9][4]


@pytest.mark.usefixtures("stand_in")
def test_answers_are_scored() -> None:
    config = ReasoningGym(dataset="sums", reward_form=0.25)
    task = config.tasks("train", 0)[0]
    right, question = task.data["entry"]["answer"], task.data["entry"]["question"]
    assert config.make().reset(task).messages == [
        {
            "role": "system",
            "content": "Think first, as <think>...</think>, then give the answer as <answer>...</answer>.",
        },
        {"role": "user", "content": question},
    ]
    reward, info = play(config, task, f"<think>so</think><answer>{right}</answer>")
    assert (reward, info) == (1.25, {"score": 1.0, "form": 1.0, "failed": 0.0, "success": True})
    # Right, but not in the form; wrong, which scores 0.01; nothing; and what the scorer cannot read.
    assert play(config, task, f"<answer>{right}</answer>")[0] == 1.0
    reward, info = play(config, task, "<think>so</think><answer>-1</answer>")
    assert (reward, info["score"], info["success"]) == (0.25, 0.01, False)
    assert play(config, task, right) == (0.0, {"score": 0.0, "form": 0.0, "success": False})
    assert play(config, task, "<answer>x</answer>") == (
        0.0,
        {"score": 0.0, "form": 0.0, "failed": 1.0, "success": False},
    )
    assert play(config.model_copy(update={"floor": 0.0}), task, "<answer>0</answer>")[0] == 0.01
    plain = ReasoningGym(dataset="sums", answer_format="number", system="")
    assert plain.make().reset(task).messages == [{"role": "user", "content": question}]
    assert play(plain, task, f"It is {right}.")[1]["success"]


@pytest.mark.usefixtures("stand_in")
def test_what_cannot_be_used() -> None:
    with pytest.raises(
        ConfigError, match=r"env\.dataset=sum, .*: Dataset 'sum' not registered; expected one of 2 names"
    ):
        ReasoningGym(dataset="sum").tasks("train", 0)
    with pytest.raises(ConfigError, match=r"env\.options=\['tip=3'\]: .*unexpected keyword argument 'tip'$"):
        ReasoningGym(dataset="sums", options=("tip=3",)).tasks("train", 0)
    with pytest.raises(ValidationError, match="'top': expected name=value"):
        ReasoningGym(dataset="sums", options=("top",))
    few = ReasoningGym(dataset="sums", options=("top=0",))
    with pytest.raises(DataError, match=r"task sums/.*/0: no question of this split in 500 seeds, expected more quest"):
        for split in ("train", "eval"):
            few._task(f"sums/{split}/0", split, 0)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning_gym._create.cache_clear()
    with pytest.raises(
        ConfigError, match=r"the package reasoning-gym cannot be imported .*: pip install 'ppojax\[envs"
    ):
        ReasoningGym(dataset="chain_sum").tasks("train", 0)


@pytest.mark.parametrize("dataset", ["chain_sum", "acre", "countdown", "spell_backward"])
def test_real_data_sets(dataset: str) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: no real data set was tried")
    config = ReasoningGym(dataset=dataset, answer_format="tags")
    train, held_out = (list(config.tasks(split, 0)[:6]) for split in ("train", "eval"))
    assert len({t.data["entry"]["question"] for t in train + held_out}) == 12
    for task in train:
        right = task.data["entry"]["answer"]
        assert play(config, task, f"<answer>{right}</answer>")[1]["success"]
        reward, info = play(config, task, "<answer>zzz</answer>")
        assert (reward, info["success"]) == (0.0, False) and info["score"] <= 0.05
