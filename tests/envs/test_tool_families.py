"""Calls as families of models write them."""

from __future__ import annotations

import json

import pytest

from ppojax.envs.functions import ArgumentsError, describe_function
from ppojax.envs.tool_calls import TOOL_FORMATS, ToolCall
from ppojax.envs.tool_families import FAMILY_FORMATS

XML, LLAMA = FAMILY_FORMATS["qwen_xml"], FAMILY_FORMATS["llama_json"]
ADD = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n"
    "</tool_call>"
)


def test_qwen_xml() -> None:
    turn = XML.parse(f"<think>hm</think>I add.\n{ADD}{ADD}")
    assert turn.calls == (ToolCall("add", {"a": "1", "b": "2"}),) * 2
    assert (turn.content, turn.reasoning, turn.errors) == ("I add.", "hm", ())
    assert XML.write(ToolCall("add", {"a": 1, "b": "2"})) == ADD
    code = "if a < b:\n    print('<parameter>')\n"
    for arguments in ({"code": code}, {"code": "\n x \n"}, {"code": ""}, {}):
        assert XML.parse(XML.write(ToolCall("run", arguments))).calls == (ToolCall("run", arguments),)
    assert XML.parse("<tool_call><function=f><parameter=x>1</parameter></function></tool_call>").calls[0].arguments == {
        "x": "1"
    }


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('<tool_call>{"name": "f"}</tool_call>', "error: expected a call as <function=NAME>...</function>"),
        ("<tool_call><function=f></tool_call>", "error: expected a call as <function=NAME>"),
        ("<tool_call><function=f>x</function></tool_call>", "error: expected parameters as <parameter=KEY>VALUE"),
        ("<tool_call><function=f><parameter=x>1</function></tool_call>", "error: expected parameters as"),
        ("<tool_call><function=f></function>", "error: <tool_call> without </tool_call>"),
        (f"<tool_call>{'x' * 70_000}</tool_call>", "error: a call of over 65536 characters"),
    ],
)
def test_malformed_xml(text: str, error: str) -> None:
    turn = XML.parse(text)
    assert not turn.calls and len(turn.errors) == 1 and turn.errors[0].startswith(error)


def mix(n: int, text: str, flag: bool = False, rows: list[int] | None = None) -> None: ...


def test_texts_are_read_by_the_schema() -> None:
    function = describe_function(mix, "k")
    given = {"n": "3", "text": "4", "flag": "true", "rows": "[1]"}
    assert function.bind(given, typed=False) == {"n": 3, "text": "4", "flag": True, "rows": [1]}
    with pytest.raises(ArgumentsError, match=r"argument n: input should be a valid integer"):
        function.bind({"n": "three", "text": "x"}, typed=False)
    with pytest.raises(ArgumentsError, match="argument n"):
        function.bind(given)


def test_llama_json() -> None:
    calls = [ToolCall("add", {"a": 1}), ToolCall("say", {"text": "{a; b}"})]
    text = "; ".join(map(LLAMA.write, calls))
    assert json.loads(LLAMA.write(calls[0])) == {"name": "add", "parameters": {"a": 1}}
    assert LLAMA.parse(f" {text}\n").calls == tuple(calls)
    assert LLAMA.parse("It is 5.").content == "It is 5."
    assert LLAMA.parse('<think>x</think>{"answer": 5}').content == '{"answer": 5}'
    assert not LLAMA.parse('{"answer": 5}').has_call
    for bad, error in (
        ('{"name": "f", }', 'error: not valid JSON, expected a call as {"name": ..., "parameters": {...}}'),
        ('{"name": 3}', 'error: expected "name", the name of a function'),
        ('{"name": "f", "parameters": [1]}', 'error: expected "parameters" as a JSON object'),
        (";".join(['{"name": "f"}'] * 17), "error: over 16 calls in a turn"),
    ):
        assert LLAMA.parse(bad).errors == (error,) and not LLAMA.parse(bad).calls


def test_the_table_has_every_format() -> None:
    assert set(FAMILY_FORMATS) == {*TOOL_FORMATS, "qwen_xml", "llama_json"}
