"""Whether a chat template only ever appends: what an append-only row of tokens needs."""

from __future__ import annotations

from ppojax.errors import DataError
from ppojax.models.chat import ChatTemplate
from ppojax.types import Messages

_USER = {"role": "user", "content": "Where is it?"}
_SYSTEM = {"role": "system", "content": "Look first."}
_TOOL = {"role": "tool", "name": "look", "tool_call_id": "call_0", "content": "7 north"}
_THOUGHT = "<think>\nIt may be north.\n</think>\n\n"


def _said(content: str, calls: int = 0, **fields: str) -> dict:
    function = {"name": "look", "arguments": {"far": True}}
    tool_calls = [{"id": f"call_{n}", "type": "function", "function": function} for n in range(calls)]
    return {"role": "assistant", "content": content, **fields, **({"tool_calls": tool_calls} if calls else {})}


# The first has to work with every template; of the others, those that a template refuses are left out.
_PROBES: tuple[Messages, ...] = (
    [_USER, _said("North."), _USER, _said("Still north."), _USER],
    [_SYSTEM, _USER, _said("North."), _USER],
    [_USER, _said("look"), _TOOL, _said("North."), _USER, _said("look"), _TOOL],
    [_USER, _said("", calls=1), _TOOL, _said("", calls=1), _TOOL, _said("North."), _USER],
    [_USER, _said("", calls=2), _TOOL, _TOOL, _said("North."), _USER],
    [_USER, _said(f"{_THOUGHT}North."), _USER, _said(f"{_THOUGHT}Still."), _USER],
    [_USER, _said(_THOUGHT, calls=1), _TOOL, _said(f"{_THOUGHT}North."), _USER],
    [_USER, _said("North.", reasoning_content="It may be north."), _USER],
)


def check_prefixes(template: ChatTemplate) -> None:
    """Check on probe conversations that later messages leave alone what was written up to an assistant turn.

    The conversations have several turns, with tool calls, tool results, and thinking (`<think>` in the content, and
    `reasoning_content`). For each assistant message k: the header that asks for it begins its turn, and the rendered
    messages `:k+1` begin the rendered messages `:j` for each later j.

    Raises DataError naming the message that changes what, and into what.
    """
    _check(template, _PROBES[0])
    for probe in _PROBES[1:]:
        try:
            template.render(probe, generation=False)
        except DataError:
            continue
        _check(template, probe)


def _check(template: ChatTemplate, messages: Messages) -> None:
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = template.render(messages[: k + 1], generation=False)
        _compare(messages[: k + 1], template.render(messages[:k], generation=True), turn)
        for j in range(k + 2, len(messages) + 1):
            if messages[j - 1]["role"] != "assistant":
                _compare(messages[:j], turn, template.render(messages[:j], generation=False))


def _compare(messages: Messages, before: str, after: str) -> None:
    if after.startswith(before):
        return
    at = next((n for n, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), len(after))
    roles = ", ".join(m["role"] for m in messages)
    raise DataError(
        f"chat template: not prefix-preserving: the last message of a conversation ({roles}) changes how the earlier "
        f"ones are written, {before[at : at + 40]!a} becomes {after[at : at + 40]!a}; expected that they stay: set "
        "model.chat_template=training, or to the path of a template that keeps them"
    )
