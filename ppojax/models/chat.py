"""Chat templates, run as untrusted code: a sandbox without side effects, with a budget of time, loops and text."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ppojax.errors import DataError
from ppojax.types import Messages

MAX_TEMPLATE_CHARS = 200_000
MAX_RENDERED_CHARS = 20_000_000
MAX_LOOP_STEPS = 100_000
MAX_SECONDS = 10.0


class _Generation(Extension):
    """`{% generation %}` marks what the model writes in training templates; here it is transparent."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops: ClassVar[set[str]] = {"*", "**", "%"}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        # Repeating a string or raising to a power is how a short template fills the memory.
        if operator == "**" or (operator == "*" and not (isinstance(left, int) and isinstance(right, int))):
            raise SecurityError(f"operator {operator!r} is only for small integers in a chat template")
        if operator == "%" and not isinstance(left, int):
            raise SecurityError("string formatting with % is not available in a chat template")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A Jinja chat template as Hugging Face writes them, compiled once.

    Raises DataError when the template is over 200 kB, does not compile, raises, or exceeds its budget. Today's date
    (`strftime_now`) is a constant, so that a run can be repeated.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", pad_token: str = "") -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise DataError(
                f"chat template: {len(source)} characters, expected at most {MAX_TEMPLATE_CHARS}; shorten the template"
            )
        self.source = source
        self.bos_token = bos_token
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        self._steps_left = 0
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        sandbox.filters["tojson"] = _tojson
        sandbox.globals["raise_exception"] = _raise_exception
        sandbox.globals["strftime_now"] = _strftime_now
        sandbox.globals["range"] = self._range
        try:
            self._template = sandbox.from_string(source)
        except TemplateError as error:
            raise DataError(f"chat template: does not compile ({error}); fix it or give another one") from error

    def render(self, messages: Messages, tools: Sequence[dict[str, Any]] = (), *, generation: bool = True) -> str:
        """Render messages to text; `generation` adds the header of the assistant turn to come."""
        self._steps_left = MAX_LOOP_STEPS
        deadline = time.monotonic() + MAX_SECONDS
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=generation,
                **self._tokens,
            ):
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED_CHARS or time.monotonic() > deadline:
                    raise SecurityError(f"over {MAX_RENDERED_CHARS} characters or {MAX_SECONDS:g} s")
        except (TemplateError, TypeError, OverflowError) as error:
            raise DataError(
                f"chat template: cannot render roles {[m.get('role') for m in messages][:8]} ({error}); "
                "expected messages that the model's template supports"
            ) from error
        return "".join(parts)

    def _range(self, *bounds: int) -> range:
        steps = range(*bounds)
        self._steps_left -= len(steps)
        if self._steps_left < 0:
            raise SecurityError(f"over {MAX_LOOP_STEPS} loop steps")
        return steps


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Unlike Jinja's own filter this does not escape HTML: the reader is a model.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return time.strftime(form, time.struct_time((2026, 1, 1, 0, 0, 0, 3, 1, 0)))
