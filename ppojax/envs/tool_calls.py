"""Tool calls as models write them: text to OpenAI function calls and back.

The policy's tokens stay as they were sampled. Parsing reads their text and decides what the environment answers;
nothing here is ever tokenised again, except for what an environment itself says.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn, Protocol

MAX_CALL_CHARS = 65_536
MAX_CALLS = 16  # of one turn

Json = dict[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` are a JSON object."""

    name: str
    arguments: Json


@dataclass(frozen=True)
class ParsedTurn:
    """What an assistant's text says: thinking, words, calls in their order, and what was wrong with the others.

    `errors` are observations, one for each call that cannot be read: they say what was expected.
    """

    content: str
    calls: tuple[ToolCall, ...] = ()
    errors: tuple[str, ...] = ()
    reasoning: str = ""

    @property
    def has_call(self) -> bool:
        """Whether a call was made or tried."""
        return bool(self.calls or self.errors)

    def message(self) -> Json:
        """The assistant message of the OpenAI chat API, its arguments as JSON text."""
        message: Json = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{n}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for n, call in enumerate(self.calls)
            ]
        return message


class ToolFormat(Protocol):
    """How calls stand in text."""

    stop: tuple[str, ...]

    def parse(self, text: str) -> ParsedTurn:
        """Read an assistant's text; never raises for what it says."""
        ...

    def write(self, call: ToolCall) -> str:
        """Write a call as the model would."""
        ...

    def answer(self, words: str) -> str:
        """Write words for the user as the model would."""
        return words

    def message(self, call: ToolCall) -> Json:
        """The assistant message that makes a call, for the chat template."""
        return {"role": "assistant", "content": self.write(call)}


class Hermes(ToolFormat):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several in a turn (Hermes, Qwen2.5, Qwen3)."""

    OPEN: ClassVar[str] = "<tool_call>"
    CLOSE: ClassVar[str] = "</tool_call>"
    # Calls may follow one another, so that a turn ends by its own token.
    stop: tuple[str, ...] = ()

    def read(self, text: str) -> ToolCall:
        """Read what stands between two tags. Raises ValueError saying what was expected."""
        return read_call(text)

    def parse(self, text: str) -> ParsedTurn:
        """Read the calls between their tags; a call that cannot be read becomes an error, the others still count."""
        reasoning, text = split_thinking(text)
        calls: list[ToolCall] = []
        errors: list[str] = []
        words: list[str] = []
        pieces = re.split(f"({self.OPEN}|{self.CLOSE})", text)
        if len(pieces) > 4 * MAX_CALLS + 1:
            return ParsedTurn(pieces[0].strip(), (), (f"error: over {MAX_CALLS} calls in a turn",), reasoning)
        at = 0
        while at < len(pieces):
            piece = pieces[at]
            if piece == self.OPEN and pieces[at + 2 : at + 3] == [self.CLOSE]:
                try:
                    calls.append(self.read(pieces[at + 1]))
                except ValueError as error:
                    errors.append(f"error: {error}")
                at += 3
                continue
            if piece in (self.OPEN, self.CLOSE):
                missing = self.CLOSE if piece == self.OPEN else self.OPEN
                errors.append(f"error: {piece} without {missing}")
                at += 2 if piece == self.OPEN else 1
                continue
            words.append(piece)
            at += 1
        return ParsedTurn("".join(words).strip(), tuple(calls), tuple(errors), reasoning)

    def write(self, call: ToolCall) -> str:
        """Write a call as Qwen3's chat template does."""
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        return f'{self.OPEN}\n{{"name": {json.dumps(call.name)}, "arguments": {arguments}}}\n{self.CLOSE}'


class Harmony(ToolFormat):
    """gpt-oss's messages to channels, which its tokenizer's `decode` leaves in the text (`models.markers.CHANNELS`).

    `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.NAME
    <|constrain|>json<|message|>{...}<|call|>`. The turn's `<|start|>assistant` is in the prompt, and its last marker
    may be missing. A recipient may stand before the channel too. Analysis is thinking; what has no recipient is for
    the user.
    """

    stop: tuple[str, ...] = ()  # <|call|> and <|return|> are the model's own ends of a turn
    PREFIX: ClassVar[str] = "functions."
    _HEAD: ClassVar[re.Pattern] = re.compile(r"<\|channel\|>\s*([a-z]+)")
    _TO: ClassVar[re.Pattern] = re.compile(r"(?:^|\s)to=([^\s<]+)")

    def parse(self, text: str) -> ParsedTurn:
        """Read the messages; one to a function that cannot be read becomes an error."""
        calls: list[ToolCall] = []
        errors: list[str] = []
        words: list[str] = []
        thoughts: list[str] = []
        if "<|channel|>" not in text and "<|message|>" not in text:
            return ParsedTurn(text)
        messages = text.split("<|start|>")
        if len(messages) > 4 * MAX_CALLS:
            return ParsedTurn("", (), (f"error: over {MAX_CALLS} calls in a turn",))
        for message in messages:
            head, begun, body = message.partition("<|message|>")
            body = re.split(r"<\|(?:end|call|return)\|>", body)[0]
            channel, to = self._HEAD.search(head), self._TO.search(head)
            if to is not None:
                try:
                    calls.append(self._read(to[1], body if begun else ""))
                except ValueError as error:
                    errors.append(f"error: {error}")
            elif begun:
                (thoughts if channel is not None and channel[1] == "analysis" else words).append(body)
        return ParsedTurn("\n".join(words).strip(), tuple(calls), tuple(errors), "\n".join(thoughts).strip())

    def _read(self, to: str, body: str) -> ToolCall:
        name = to.removeprefix(self.PREFIX)
        if name == to or not name:
            raise ValueError(f"no recipient {to[:64]!r}, expected to=functions.NAME")
        if len(body) > MAX_CALL_CHARS:
            raise ValueError(f"a call of over {MAX_CALL_CHARS} characters")
        return ToolCall(name, _read_object(body, f"the arguments of {name[:64]} as a JSON object"))

    def write(self, call: ToolCall) -> str:
        """Write a call as gpt-oss does."""
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        return f"<|channel|>commentary to={self.PREFIX}{call.name} <|constrain|>json<|message|>{arguments}<|call|>"

    def answer(self, words: str) -> str:
        """Write words to the final channel."""
        return f"<|channel|>final<|message|>{words}"

    def message(self, call: ToolCall) -> Json:
        """A message with `tool_calls`: a content cannot leave its channel."""
        return ParsedTurn("", (call,)).message()


class Calc(ToolFormat):
    """`<calc>expression</calc>`: one call at the end of a turn, which ends it."""

    OPEN: ClassVar[str] = "<calc>"
    CLOSE: ClassVar[str] = "</calc>"
    stop: tuple[str, ...] = (CLOSE,)

    def parse(self, text: str) -> ParsedTurn:
        """Read the call that ends the text; other tags, or text after it, are an error."""
        if self.OPEN not in text and self.CLOSE not in text:
            return ParsedTurn(text)
        before, _, rest = text.partition(self.OPEN)
        expression, closed, after = rest.partition(self.CLOSE)
        if not closed or after.strip() or self.CLOSE in before or self.OPEN in expression:
            return ParsedTurn(before, errors=("error",))
        return ParsedTurn(before, (ToolCall("calc", {"expression": expression}),))

    def write(self, call: ToolCall) -> str:
        """Write the expression between the tags."""
        return f"{self.OPEN}{call.arguments['expression']}{self.CLOSE}"


ToolFormatName = Literal["calc", "hermes", "harmony"]
# By name, so that a setting can ask for one; another format is a class like these, and a line here.
TOOL_FORMATS: dict[ToolFormatName, ToolFormat] = {"calc": Calc(), "hermes": Hermes(), "harmony": Harmony()}


def tool_message(content: str, call: int = 0, name: str = "") -> Json:
    """An observation, for the template's own tool role."""
    return {"role": "tool", "tool_call_id": f"call_{call}", **({"name": name} if name else {}), "content": content}


def split_thinking(text: str) -> tuple[str, str]:
    """Split thinking off the words. `<think>...</think>` at the front, whose opening tag may be in the prompt; or what
    gpt-oss says to its analysis channel. Unfinished thinking is all."""
    if "<|channel|>" in text and "<|message|>" in text:
        turn = TOOL_FORMATS["harmony"].parse(text)
        return turn.reasoning, turn.content
    thinking, closed, rest = text.partition("</think>")
    if closed:
        return thinking.partition("<think>")[2].strip() if "<think>" in thinking else thinking.strip(), rest.lstrip(
            "\n"
        )
    if text.lstrip().startswith("<think>"):
        return text.partition("<think>")[2].strip(), ""
    return "", text


def read_call(text: str, key: str = "arguments") -> ToolCall:
    """Read a JSON object with `name` and the arguments under `key`. Raises ValueError saying what was expected."""
    if len(text) > MAX_CALL_CHARS:
        raise ValueError(f"a call of over {MAX_CALL_CHARS} characters")
    call = _read_object(text, f'a call as {{"name": ..., "{key}": {{...}}}}')
    name, arguments = call.get("name"), call.get(key, {})
    if not isinstance(name, str) or not name:
        raise ValueError('expected "name", the name of a function')
    if isinstance(arguments, str):
        arguments = _read_object(arguments, f'"{key}" as a JSON object')
    if not isinstance(arguments, dict):
        raise ValueError(f'expected "{key}" as a JSON object')
    return ToolCall(name, arguments)


def _read_object(text: str, expected: str) -> Json:
    try:
        value = json.loads(text, parse_constant=_refuse)
        # 1e999 is read as infinite, and lone surrogates could never be written into a row.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON, expected {expected}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected {expected}")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
