"""Chat templates, run as untrusted code: a sandbox without side effects, with a budget of time, loops and text."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from ppojax.errors import DataError
from ppojax.models.sandbox import MAX_VALUE_CHARS, Budget, Sandbox
from ppojax.types import Messages

MAX_TEMPLATE_CHARS = 200_000
# What a template can run into: Jinja's own errors, and Python's of the values that it handles.
_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatTemplate:
    """A Jinja chat template as Hugging Face writes them, compiled once.

    Raises DataError when the template is over 200 kB, does not compile, raises, or exceeds its budget. Today's date
    (`strftime_now`) is a constant, so that a run can be repeated. `ends` are tokens that end a turn besides those that
    the tokenizer's files name.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        pad_token: str = "",
        ends: Sequence[str] = (),
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise DataError(
                f"chat template: {len(source)} characters, expected at most {MAX_TEMPLATE_CHARS}; shorten the template"
            )
        self.source = source
        self.bos_token = bos_token
        self.ends = tuple(ends)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        filters = {"tojson": _tojson}
        self._sandbox = Sandbox(filters, {"raise_exception": self._raise_exception, "strftime_now": _strftime_now})
        try:
            self._template = self._sandbox.from_string(source)
        except (TemplateError, SyntaxError, RecursionError, MemoryError, OverflowError) as error:
            raise DataError(f"chat template: does not compile ({error!s:.200}); fix it or give another one") from error

    def render(self, messages: Messages, tools: Sequence[dict[str, Any]] = (), *, generation: bool = True) -> str:
        """Render messages to text; `generation` adds the header of the assistant turn to come."""
        self._sandbox.budget = Budget()
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
                if size > MAX_VALUE_CHARS:
                    raise SecurityError(f"over {MAX_VALUE_CHARS} characters")
        except _FAULTS as error:
            raise DataError(
                f"chat template: cannot render roles {[m.get('role') for m in messages][:8]} ({error!s:.200}); "
                "expected messages that the model's template supports"
            ) from error
        return "".join(parts)

    def _raise_exception(self, message: Any) -> NoReturn:
        raise TemplateError(self._sandbox.budget.text(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if (indent or 0) > 16 or max(map(len, separators or ("",))) > 8:
        raise SecurityError("tojson indents by at most 16, with separators of at most 8 characters")
    # Unlike Jinja's own filter this does not escape HTML: the reader is a model.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return time.strftime(form, time.struct_time((2026, 1, 1, 0, 0, 0, 3, 1, 0)))
