"""Calls in text, by hand-written cases: what is read, what is refused and how, and that writing is read back."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppojax.envs import Calculator, Task
from ppojax.envs.answers import extract
from ppojax.envs.tool_calls import MAX_CALL_CHARS, TOOL_FORMATS, ToolCall, ToolFormatName, split_thinking, tool_message

HERMES, CALC, HARMONY = TOOL_FORMATS["hermes"], TOOL_FORMATS["calc"], TOOL_FORMATS["harmony"]
ADD = '<tool_call>\n{"name": "calc", "arguments": {"expression": "12+45"}}\n</tool_call>'
TASK = Task("t", {"a": 12, "b": 45, "operator": "+"})


def call(arguments: str = "{}", name: str = '"f"') -> str:
    return f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (call('{"a": 1, "b": [true, null]}'), {"a": 1, "b": [True, None]}),
        (call('"{\\"a\\": 1}"'), {"a": 1}),  # as text
        (call(), {}),
        ('<tool_call>{"name": "f"}</tool_call>', {}),
        ('<tool_call>\n\n {"arguments": {"x": "\\u00e9\\n<b>"}, "name": "f"} \n</tool_call>', {"x": "\u00e9\n<b>"}),
    ],
)
def test_a_call_is_read(text: str, arguments: dict) -> None:
    turn = HERMES.parse(text)
    assert (turn.calls, turn.errors, turn.content) == ((ToolCall("f", arguments),), (), "")
    message = turn.message()
    assert message["tool_calls"][0] | {"function": None} == {"id": "call_0", "type": "function", "function": None}
    assert message["tool_calls"][0]["function"]["name"] == "f"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == arguments


def test_several_calls_words_and_thinking() -> None:
    turn = HERMES.parse(f"<think>\n1 + 1?\n</think>\n\nLet me see.\n{call()}\n{call('[]')}{ADD} and")
    assert (turn.reasoning, turn.content) == ("1 + 1?", "Let me see.\n\n and")
    assert [c.name for c in turn.calls] == ["f", "calc"]
    assert turn.errors == ('error: expected "arguments" as a JSON object',)
    message = turn.message()
    assert [c["id"] for c in message["tool_calls"]] == ["call_0", "call_1"]
    assert message["reasoning_content"] == "1 + 1?"
    # A call inside thinking is a thought; thinking that never ends says nothing.
    assert not HERMES.parse(f"<think>{ADD}</think>57").has_call
    assert HERMES.parse(f"{ADD}</think>57").content == "57"
    assert HERMES.parse(f"<think>{ADD}").content == ""
    assert HERMES.parse("plain").message() == {"role": "assistant", "content": "plain"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>not json</tool_call>", "error: not valid JSON, expected a call as"),
        ('<tool_call>{"name": "f", }</tool_call>', "error: not valid JSON"),
        ("<tool_call></tool_call>", "error: not valid JSON"),
        ("<tool_call>[1]</tool_call>", 'error: expected a call as {"name": ..., "arguments": {...}}'),
        ('<tool_call>{"arguments": {}}</tool_call>', 'error: expected "name", the name of a function'),
        (call(name="7"), 'error: expected "name"'),
        (call(name='""'), 'error: expected "name"'),
        (call("7"), 'error: expected "arguments" as a JSON object'),
        (call('"7"'), 'error: expected "arguments" as a JSON object'),
        (call('"x"'), 'error: not valid JSON, expected "arguments" as a JSON object'),
        (call('{"x": NaN}'), "error: not valid JSON"),
        (call('{"x": 1e999}'), "error: not valid JSON"),
        (call('{"x": ' + "9" * 5000 + "}"), "error: not valid JSON"),
        (call('{"x": "\\ud800"}'), "error: not valid JSON"),
        (call('{"x": ' + "[" * 20_000 + "]" * 20_000 + "}"), "error: not valid JSON"),
        (call('"' + "x" * MAX_CALL_CHARS + '"'), "error: a call of over 65536 characters"),
        ('<tool_call>{"name": "f"', "error: <tool_call> without </tool_call>"),
        ('{"name": "f"}</tool_call>', "error: </tool_call> without <tool_call>"),
        ("<tool_call>" * 40, "error: over 16 calls in a turn"),
    ],
)
def test_malformed_calls_become_observations(text: str, error: str) -> None:
    turn = HERMES.parse(text)
    assert turn.has_call and not turn.calls
    assert len(turn.errors) == 1 and turn.errors[0].startswith(error)
    assert "tool_calls" not in turn.message()
    turn.errors[0].encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=6,
)


# The table of characters takes seconds to build where it is not cached.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), json_values, max_size=3))
def test_what_is_written_is_read_back(arguments: dict) -> None:
    made = ToolCall("look", arguments)
    if "tool_call>" not in json.dumps(arguments):
        assert HERMES.parse(f"So: {HERMES.write(made)}").calls == (made,)
    if "<|" not in json.dumps(arguments):
        assert HARMONY.parse(ANALYSIS + HARMONY.write(made)).calls == (made,)


F = ToolCall("f", {"a": 1})
ANALYSIS = "<|channel|>analysis<|message|>1 + 1?<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "content", "calls", "reasoning"),
    [
        ('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>', "", (F,), ""),
        (ANALYSIS + '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}', "", (F,), "1 + 1?"),
        (ANALYSIS + ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', "", (F,), "1 + 1?"),
        (ANALYSIS + "<|channel|>final<|message|>It is\n2.<|return|>", "It is\n2.", (), "1 + 1?"),
        (
            "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            '<|constrain|>json<|message|>{"a": 1}<|call|>',
            "Let me see.",
            (F,),
            "",
        ),
        # A call in a thought has no recipient; a thought that never ends says nothing.
        ('<|channel|>analysis<|message|>to=functions.f {"a": 1}', "", (), 'to=functions.f {"a": 1}'),
        ("<|channel|>final", "", (), ""),
        ("just words", "just words", (), ""),
    ],
)
def test_channels_are_read(text: str, content: str, calls: tuple, reasoning: str) -> None:
    turn = HARMONY.parse(text)
    assert (turn.content, turn.calls, turn.errors, turn.reasoning) == (content, calls, (), reasoning)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "commentary to=functions.f <|constrain|>json<|message|>{",
            "error: not valid JSON, expected the arguments of f",
        ),
        ("commentary to=functions.f<|message|>[1]", "error: expected the arguments of f as a JSON object"),
        ("commentary to=functions.f", "error: not valid JSON, expected the arguments of f"),
        (
            "commentary to=browser.search<|message|>{}",
            "error: no recipient 'browser.search', expected to=functions.NAME",
        ),
        ("commentary to=functions.<|message|>{}", "error: no recipient 'functions.', expected"),
        ("commentary to=functions.f<|message|>" + " " * 70_000, "error: a call of over 65536 characters"),
        ("final<|message|>" + "<|start|>" * 70, "error: over 16 calls in a turn"),
    ],
)
def test_malformed_harmony_becomes_observations(text: str, error: str) -> None:
    turn = HARMONY.parse("<|channel|>" + text)
    assert turn.has_call and not turn.calls
    assert len(turn.errors) == 1 and turn.errors[0].startswith(error)


def test_analysis_is_thinking() -> None:
    said = "<|channel|>analysis<|message|>40 or 41?<|end|><|start|>assistant<|channel|>final<|message|>It is 42."
    assert split_thinking(said) == ("40 or 41?", "It is 42.")
    assert extract(said, "whole") == "It is 42." and extract(said[:40], "number") is None


def test_calc_tags_are_a_format_too() -> None:
    assert CALC.parse("So <calc>1+2</calc> ").calls == (ToolCall("calc", {"expression": "1+2"}),)
    assert CALC.write(ToolCall("calc", {"expression": "1+2"})) == "<calc>1+2</calc>"
    assert CALC.parse("<calc>1+2</calc>x").errors == ("error",)
    assert (CALC.stop, HERMES.stop) == (("</calc>",), ())


def test_the_calculator_speaks_hermes() -> None:
    config = Calculator(tool_format="hermes", system="", max_turns=3)
    env = config.make()
    reset = env.reset(TASK)
    assert reset.tools[0]["function"]["name"] == "calc"
    assert HERMES.parse(reset.messages[1]["content"]).calls == (ToolCall("calc", {"expression": "23+45"}),)
    first = env.step({"role": "assistant", "content": "<tool_call>{</tool_call>" + call() + call(name='"calc"')})
    assert [m["content"][:12] for m in first.messages] == ["error: not v", "error: expec", "error: expec"]
    assert (first.reward, first.info["malformed"], first.terminated) == (0.0, 3, False)
    second = env.step({"role": "assistant", "content": f"<think>\n12 and 45\n</think>\n\n{ADD}"})
    assert second.messages == [tool_message("57", 0, "calc")]
    assert (second.reward, second.info["call_ok"]) == (0.5, True)
    third = env.step({"role": "assistant", "content": "<think>\n12+45 is 57\n</think>\n\nIt is 57."})
    assert (third.reward, third.terminated, third.info["success"]) == (0.5, True, True)


def test_the_calculator_says_how_it_is_used() -> None:
    said = {name: Calculator(tool_format=name).make().reset(TASK).messages[0]["content"] for name in TOOL_FORMATS}
    assert said == {"calc": "Use calc tags.", "hermes": "Use the calc function.", "harmony": "Use the calc function."}
    assert Calculator(system="").make().reset(TASK).messages[0]["role"] == "user"


@pytest.mark.parametrize("tool_format", ["hermes", "harmony"])
def test_the_expert_of_the_calculator_succeeds(tool_format: ToolFormatName) -> None:
    config = Calculator(tool_format=tool_format, operators=("-",), low=-20)
    for task in config.tasks("eval", 0)[:20]:
        env = config.make()
        messages, total = list(env.reset(task).messages), 0.0
        for _ in range(2):
            text = config.expert(messages, task)
            step = env.step({"role": "assistant", "content": text})
            messages += [{"role": "assistant", "content": text}, *step.messages]
            total += step.reward
        assert total == 1.0 and step.info["success"]
