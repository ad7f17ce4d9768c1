"""How families of models write calls that are not Hermes JSON, and the table of all formats."""

from __future__ import annotations

import json
import re
from typing import ClassVar, Literal

from ppojax.envs.tool_calls import (
    MAX_CALL_CHARS,
    MAX_CALLS,
    TOOL_FORMATS,
    Hermes,
    ParsedTurn,
    ToolCall,
    ToolFormat,
    ToolFormatName,
    read_call,
    split_thinking,
)


class QwenXml(Hermes):
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>` (Qwen3-Coder, Qwen3.5).

    A value is text as it stands, without the line breaks around it: what type it has follows from the function's
    schema (`Function.bind`).
    """

    _FUNCTION: ClassVar[re.Pattern[str]] = re.compile(r"\s*<function=([^<>\s]+)>(.*)</function>\s*", re.DOTALL)
    _PARAMETER: ClassVar[re.Pattern[str]] = re.compile(
        r"\s*<parameter=([^<>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL
    )

    def read(self, text: str) -> ToolCall:
        """Read a function and its parameters. Raises ValueError."""
        if len(text) > MAX_CALL_CHARS:
            raise ValueError(f"a call of over {MAX_CALL_CHARS} characters")
        function = self._FUNCTION.fullmatch(text)
        if function is None:
            raise ValueError("expected a call as <function=NAME>...</function>")
        name, rest = function.groups()
        arguments: dict[str, str] = {}
        at = 0
        while parameter := self._PARAMETER.match(rest, at):
            arguments[parameter[1]] = parameter[2]
            at = parameter.end()
        if rest[at:].strip():
            raise ValueError("expected parameters as <parameter=KEY>VALUE</parameter>")
        return ToolCall(name, arguments)

    def write(self, call: ToolCall) -> str:
        """Write a call as Qwen3-Coder's chat template does."""
        values = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in call.arguments.items()}
        parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"{self.OPEN}\n<function={call.name}>\n{parameters}</function>\n{self.CLOSE}"


class LlamaJson(ToolFormat):
    """`{"name": ..., "parameters": {...}}` as all of the turn, several with a `;` between them (Llama 3.1 and later).

    A turn that starts with a brace and names nothing is an answer in JSON.
    """

    stop: tuple[str, ...] = ()

    def parse(self, text: str) -> ParsedTurn:
        """Read the calls; one that cannot be read becomes an error."""
        reasoning, words = split_thinking(text)
        words = words.strip()
        if not words.startswith("{") or '"name"' not in words:
            return ParsedTurn(words, reasoning=reasoning)
        pieces = re.split(r"(?<=\})\s*;\s*(?=\{)", words)
        if len(pieces) > MAX_CALLS:
            return ParsedTurn("", (), (f"error: over {MAX_CALLS} calls in a turn",), reasoning)
        calls: list[ToolCall] = []
        errors: list[str] = []
        for piece in pieces:
            try:
                calls.append(read_call(piece, "parameters"))
            except ValueError as error:
                errors.append(f"error: {error}")
        return ParsedTurn("", tuple(calls), tuple(errors), reasoning)

    def write(self, call: ToolCall) -> str:
        """Write a call as Llama's chat template does."""
        parameters = json.dumps(call.arguments, ensure_ascii=False)
        return f'{{"name": {json.dumps(call.name)}, "parameters": {parameters}}}'


FamilyFormatName = ToolFormatName | Literal["qwen_xml", "llama_json"]
FAMILY_FORMATS: dict[FamilyFormatName, ToolFormat] = {
    **TOOL_FORMATS,
    "qwen_xml": QwenXml(),
    "llama_json": LlamaJson(),
}
# Formats whose arguments are text, whatever their type.
UNTYPED: frozenset[FamilyFormatName] = frozenset({"qwen_xml"})
