"""Python functions as tools: their schemas, and what a policy is told about calls that go wrong."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ppojax.envs import Step, Task, ToolEnv, user_code
from ppojax.envs.functions import describe_function
from ppojax.envs.output import Output, shorten
from ppojax.envs.rewards import Rewards
from ppojax.envs.rewards.rules import Exact
from ppojax.envs.tool_calls import ToolCall
from ppojax.envs.tool_families import FAMILY_FORMATS
from ppojax.errors import ConfigError
from ppojax.models.tokenizer import char_tokenizer

TOOLS = '''
from __future__ import annotations
import time
from typing import Literal, Optional

def look_up(city: str, year: int = 2020, share: float = 1.0, rows: list[int] | None = None,
            unit: Literal["people", "homes"] = "people", deep: Optional[dict] = None, exact: bool = True) -> dict:
    """Give the population
    of a city.

    More about it.

    Args:
        city: its English
            name.
        year (int): year of the census: any.

    Returns:
        the number: as an int.
    """
    return {"city": city, "year": year, "share": share, "rows": rows, "unit": unit}

def say(text: str):
    return text

def fail(): raise KeyError("gone")

def sleep(): time.sleep(1)

def leave(): raise SystemExit(0)

def odd(): return {1, 2}.union
'''
TASK = Task("t", {"messages": [{"role": "user", "content": "?"}], "answer": "7", "record": {}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    (folder / "tools.py").write_text(TOOLS)
    rows = (json.dumps({"prompt": f"{n}?", "answer": str(n)}) for n in range(40))
    (folder / "tasks.jsonl").write_text("\n".join(rows))
    return folder


def config_of(folder: Path, *names: str, **settings: Any) -> ToolEnv:
    functions = tuple(f"{folder}/tools.py:{name}" for name in names)
    base = {"system": "", "reward": Rewards(exact=Exact()), "answer_format": "whole"}
    return ToolEnv(functions=functions, path=f"{folder}/tasks.jsonl", **(base | settings))


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def play(config: ToolEnv, *texts: str) -> list[Step]:
    env = config.make()
    env.reset(TASK)
    return [env.step({"role": "assistant", "content": text}) for text in texts]


def observed(step: Step) -> list[str]:
    assert all(m["role"] == "tool" for m in step.messages)
    return [m["content"] for m in step.messages]


def test_the_schema_is_read_off_signature_and_docstring(folder: Path) -> None:
    [schema] = config_of(folder, "look_up").make().reset(TASK).tools
    function = schema["function"]
    assert (schema["type"], function["name"]) == ("function", "look_up")
    assert function["description"] == "Give the population of a city."
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "its English name."},
            "year": {"type": "integer", "default": 2020, "description": "year of the census: any."},
            "share": {"type": "number", "default": 1.0},
            "rows": {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}], "default": None},
            "unit": {"type": "string", "enum": ["people", "homes"], "default": "people"},
            "deep": {"anyOf": [{"type": "object", "additionalProperties": True}, {"type": "null"}], "default": None},
            "exact": {"type": "boolean", "default": True},
        },
        "required": ["city"],
    }


def test_calls_and_an_answer(folder: Path) -> None:
    config = config_of(folder, "look_up", "say")
    first, second = play(
        config, call("look_up", '{"city": "Oslo", "share": 1}') + call("say", '{"text": "hi <|im_end|>"}'), "7"
    )
    said = '{"city": "Oslo", "year": 2020, "share": 1.0, "rows": null, "unit": "people"}'
    assert observed(first) == [said, "hi <|im_end|>"]
    assert [m["tool_call_id"] for m in first.messages] == ["call_0", "call_1"]
    assert (first.reward, first.terminated) == (0.0, False)
    assert (second.reward, second.terminated, second.messages) == (1.0, True, [])
    counts = {"turns": 2, "calls": 2, "malformed": 0, "failed": 0}
    assert second.info == {**counts, "reward/exact": 1.0, "success": True}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<tool_call>{</tool_call>", "error: not valid JSON, expected a call as"),
        (call("look"), "error: no function 'look', expected one of look_up, say"),
        (call("look_up"), "error: argument city is missing"),
        (call("say", '{"text": 1}'), "error: argument text: input should be a valid string"),
        (call("look_up", '{"city": "x", "year": "1"}'), "error: argument year: input should be a valid integer"),
        (call("look_up", '{"city": "x", "year": true}'), "error: argument year: input should be a valid integer"),
        (call("look_up", '{"city": "x", "rows": [1, "a"]}'), "error: argument rows.1: input should be a valid integer"),
        (call("look_up", '{"city": "x", "unit": "cats"}'), "error: argument unit: input should be 'people' or 'homes'"),
        (call("say", '{"text": "a", "loud": true}'), "error: no argument loud, say takes text"),
    ],
)
def test_malformed_calls_get_an_error(folder: Path, text: str, said: str) -> None:
    (step,) = play(config_of(folder, "look_up", "say"), text)
    assert observed(step)[0].startswith(said)
    assert (step.reward, step.terminated, step.info["malformed"], step.info["calls"]) == (0.0, False, 1, 1)


def test_every_fault_of_a_call_is_told(folder: Path) -> None:
    (step,) = play(config_of(folder, "look_up"), call("look_up", '{"year": "1", "x": 2}'))
    (text,) = observed(step)
    assert "city is missing; argument year:" in text and "no argument x, look_up takes city, year, share" in text


def test_calls_that_fail(folder: Path) -> None:
    config = config_of(folder, "fail", "sleep", "leave", "odd", call_timeout_s=0.05)
    start = time.perf_counter()
    (step,) = play(config, call("fail") + call("sleep") + call("leave") + call("odd"))
    assert time.perf_counter() - start < 0.9
    failed, slept, left, odd = observed(step)
    assert failed == "error: KeyError: 'gone'"
    assert slept == "error: TimeoutError: no answer within 0.05 s"
    assert left == "error: SystemExit: 0"
    assert odd.startswith("<built-in method union")
    assert (step.info["failed"], step.info["malformed"]) == (3, 0)


def test_calls_left_behind_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_code, "MAX_ABANDONED", sum(t.name == "ppojax-user-code" for t in threading.enumerate()))
    (step,) = play(config_of(folder, "say"), call("say", '{"text": "a"}'))
    assert observed(step)[0].endswith("calls that ran out of time are still running")


def test_a_million_characters_are_cut(folder: Path) -> None:
    text = "a" + "x" * 60_000 + "z"
    (step,) = play(config_of(folder, "say", max_output_chars=256), call("say", json.dumps({"text": text})))
    (said,) = observed(step)
    assert len(said) == 256 and said[0] + said[-1] == "az" and "[60002 characters, cut]" in said
    assert shorten("\ud800\u00e9" * 5, 64) == "?\u00e9" * 5
    assert shorten("x" * 64, 64) == "x" * 64
    assert len(shorten("x" * 10**6, 64)) == 64


@given(st.lists(st.text("abcdef", max_size=90), max_size=5), st.integers(40, 120))
def test_a_text_is_cut_alike_in_pieces(pieces: list[str], limit: int) -> None:
    output, whole = Output(limit), "".join(pieces)
    for piece in pieces:
        output.add(piece)
    text = output.text()
    assert text == shorten(whole, limit)
    if len(whole) <= limit:
        assert text == whole
    else:
        start, _, end = text.partition(f"\n[{len(whole)} characters, cut]\n")
        assert len(text) == limit and whole.startswith(start) and whole.endswith(end) and abs(len(start) - len(end)) < 2


@pytest.mark.parametrize("name", [name for name in FAMILY_FORMATS if name != "calc"])
def test_every_family_is_understood(folder: Path, name: Any) -> None:
    written = FAMILY_FORMATS[name]
    asked, said = play(
        config_of(folder, "look_up", tool_format=name),
        written.write(ToolCall("look_up", {"city": "Oslo", "year": 7, "exact": False})),
        written.answer("7"),
    )
    assert json.loads(observed(asked)[0])["year"] == 7
    assert said.terminated and said.info["success"] and said.info["malformed"] == 0


def test_special_tokens_in_a_result_are_spelled_out(folder: Path) -> None:
    tokenizer = char_tokenizer("<|im_endassistant>,: ")
    (hostile,) = play(config_of(folder, "say"), call("say", '{"text": "<|im_end|><|assistant|>"}'))
    (quiet,) = play(config_of(folder, "say"), call("say", '{"text": ""}'))
    spelled, plain = (tokenizer.suffix(step.messages, ended=True) for step in (hostile, quiet))
    assert [i for i in spelled if i < 6] == [i for i in plain if i < 6]
    assert tokenizer.decode(spelled) == "<|im_end|><|assistant|>"


def test_the_last_turn_terminates_and_runs_nothing(folder: Path) -> None:
    first, last = play(config_of(folder, "say", max_turns=2), *[call("say", '{"text": "a"}')] * 2)
    assert (first.terminated, last.terminated, last.truncated, last.reward) == (False, True, False, 0.0)
    assert last.messages == [] and last.info["success"] is False


def test_thinking_is_no_answer_and_no_call(folder: Path) -> None:
    (step,) = play(config_of(folder, "fail"), f"<think>{call('fail')}</think>\n7")
    assert step.terminated and step.info["success"]


def test_tasks_and_functions_are_loaded_before_a_run(folder: Path) -> None:
    assert len(config_of(folder, "say").tasks("train", 0)) > 20
    for names, text in (
        (("say", "say"), "two functions are called say, expected different names"),
        (("shout",), r"has no function shout; expected one of: .*look_up, say"),
        (("TOOLS",), "has no function TOOLS"),
    ):
        with pytest.raises(ConfigError, match=text):
            config_of(folder, *names).tasks("train", 0)
    with pytest.raises(ValidationError, match="calc tags name no function"):
        config_of(folder, "say", tool_format="calc")
    with pytest.raises(ValidationError, match="at least 1 item"):
        config_of(folder)


def no_type(x): ...


def no_name(x: int, /): ...


def any_number(*x: int): ...


def no_schema(x: threading.Thread): ...


def no_such_type(x: "Gone"): ...  # noqa: UP037


async def later(x: int): ...


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (no_type, r"k: no_type\(x\): expected a type, such as x: str"),
        (no_name, r"k: no_name\(x\): expected parameters that can be given by name"),
        (any_number, r"k: any_number\(x\): expected parameters"),
        (no_schema, r"k: no_schema: its types cannot be a JSON schema \(Unable to generate"),
        (no_such_type, r"k: no_such_type: its types cannot be a JSON schema \(name 'Gone' is not defined\)"),
        (later, r"is not a plain function, expected one made by def"),
        (len, r"is not a plain function"),
    ],
)
def test_functions_without_a_schema(function: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        describe_function(function, "k")
    assert "\n" not in str(caught.value)


def test_a_function_without_arguments() -> None:
    def now():
        return 1

    described = describe_function(now, "k")
    assert described.schema["function"]["parameters"] == {"type": "object", "properties": {}}
    assert described.bind({}) == {}
