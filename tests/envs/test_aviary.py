"""Environments of aviary, where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ppojax.envs import Aviary, Step
from ppojax.errors import ConfigError, DataError

CODE = '''
import asyncio
from aviary.core import Environment, Message, TaskDataset, Tool, ToolRequestMessage

class Guess(Environment):
    """Guess the number; `look` says it."""

    def __init__(self, number):
        self.number, self.closed = number, False

    async def reset(self):
        def look(where: str) -> str:
            """Look at it.

            Args:
                where: a place.
            """
            return f"it is {self.number} in {where}" + "!" * 9999
        self.tools = [Tool.from_function(look)]
        self.state = None
        await asyncio.sleep(0)
        return [Message(content="Which number?")], self.tools

    async def step(self, action):
        if isinstance(action, ToolRequestMessage):
            return await self.exec_tool_calls(action), 0.0, False, False
        if action.content == "sleep":
            await asyncio.sleep(9)
        if action.content == "later":
            return [Message(content="When?")], 0.25, False, False
        return [], float(action.content == str(self.number)), True, False

    async def close(self):
        self.closed = True

    def export_frame(self):
        raise NotImplementedError

class Numbers(TaskDataset):
    def __len__(self):
        return 30

    def get_new_env_by_idx(self, idx):
        return Guess(idx)

class One(Numbers):
    def __len__(self):
        return 1

class Endless(TaskDataset):
    pass
'''


def call(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@pytest.fixture
def path(tmp_path: Path) -> str:
    pytest.importorskip("aviary.core", reason="fhaviary is not installed: aviary's environments were not tried")
    (tmp_path / "numbers.py").write_text(CODE)
    return f"{tmp_path}/numbers.py"


def play(config: Aviary, *texts: str) -> list[Step]:
    env = config.make()
    reset = env.reset(config.tasks("train", 0)[2])
    assert [m["content"] for m in reset.messages] == ["Which number?"]
    assert reset.tools[0]["function"]["parameters"]["properties"]["where"]["type"] == "string"
    steps = [env.step({"role": "assistant", "content": text}) for text in texts]
    env.close()
    assert env._env.closed and env._loop.is_closed()
    return steps


def number(config: Aviary) -> str:
    return str(config.tasks("train", 0)[2].data["number"])


def test_an_episode(path: str) -> None:
    config = Aviary(dataset=f"{path}:Numbers", max_output_chars=256)
    asked, later, said = play(config, call("look", '{"where": "bed"}'), "later", number(config))
    (message,) = asked.messages
    assert message["role"] == "tool" and message["name"] == "look" and message["tool_call_id"] == "call_0"
    assert message["content"].startswith(f"it is {number(config)} in bed!") and len(message["content"]) == 256
    assert (later.reward, later.messages[0]["content"]) == (0.25, "When?")
    assert (said.reward, said.terminated, said.info) == (1.0, True, {"turns": 3, "success": True})


def test_malformed_calls_are_answered_here(path: str) -> None:
    config = Aviary(dataset=f"{path}:Numbers")
    bad, mixed = play(config, "<tool_call>{</tool_call>", call("see", "{}") + call("look", '{"where": "x"}'))
    assert [m["content"][:21] for m in bad.messages] == ["error: not valid JSON"]
    assert [m["content"][:6] for m in mixed.messages] == ["error:", "it is "]
    assert mixed.messages[0]["content"] == "error: no tool 'see', expected one of look"


def test_limits(path: str) -> None:
    config = Aviary(dataset=f"{path}:Numbers", max_turns=1, step_timeout_s=0.05)
    (step,) = play(config, "later")
    assert (step.truncated, step.terminated, step.messages, step.info["success"]) == (True, False, [], False)
    with pytest.raises(TimeoutError):
        play(config, "sleep")


def test_splits(path: str) -> None:
    config = Aviary(dataset=f"{path}:Numbers")
    numbers = {split: {t.data["number"] for t in config.tasks(split, 0)} for split in ("train", "eval")}
    assert numbers["train"] | numbers["eval"] == set(range(30)) and not numbers["train"] & numbers["eval"]
    two = Aviary(dataset=f"{path}:Numbers", eval_dataset=f"{path}:One")
    assert (len(two.tasks("train", 0)), [t.data["number"] for t in two.tasks("eval", 0)]) == (30, [0])
    with pytest.raises(ConfigError, match=r"Endless: gives no task dataset of known length \(TypeError"):
        Aviary(dataset=f"{path}:Endless").tasks("train", 0)
    one = Aviary(dataset=f"{path}:One")
    with pytest.raises(DataError, match=r"One: no task to (train|eval), expected some"):
        [one.tasks(split, 0) for split in ("train", "eval")]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aviary.core", None)
    with pytest.raises(ConfigError, match=r"fhaviary cannot be imported .*: pip install 'ppojax\[aviary\]'"):
        Aviary(dataset="x:y").tasks("train", 0)


def test_settings() -> None:
    config: Any = Aviary(dataset="x:y")
    assert (config.stop, config.has_expert, hash(config) == hash(Aviary(dataset="x:y"))) == ((), False, True)
