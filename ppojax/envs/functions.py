"""Python functions as tools: their JSON schema from signature and docstring, and calls checked against it."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from ppojax.errors import ConfigError


class ArgumentsError(ValueError):
    """A call's arguments are missing, too many, or of another type than the schema says."""


@dataclass(frozen=True)
class Function:
    """A function that a policy can call."""

    name: str
    schema: dict[str, Any]  # an OpenAI function tool
    call: Callable[..., Any]
    arguments: type[BaseModel]

    def bind(self, arguments: dict[str, Any], *, typed: bool = True) -> dict[str, Any]:
        """Check arguments and fill in defaults. Raises ArgumentsError, saying what is wrong with each.

        Arguments that are not `typed` are texts: one that is no text by the schema is read as JSON.
        """
        try:
            model = self.arguments.model_validate_json(json.dumps(arguments))
        except ValidationError as error:
            if not typed and (read := _read_texts(arguments, error)) != arguments:
                return self.bind(read)
            known = ", ".join(f.alias or "" for f in self.arguments.model_fields.values()) or "no arguments"
            faults = (_fault(e, f"{self.name} takes {known}") for e in error.errors(include_url=False))
            raise ArgumentsError("; ".join(dict.fromkeys(faults))) from error
        names = (f.alias or "" for f in type(model).model_fields.values())
        return {name: value for name, (_, value) in zip(names, model, strict=True)}


def describe_function(function: Callable[..., Any], key: str) -> Function:
    """Read a function's schema off its signature and docstring.

    Every parameter has a type: int, float, str, bool, list, dict, `X | None`, `Literal[...]`, or what else pydantic can
    write as JSON schema. The docstring's first paragraph describes the function, the lines under `Args:` describe the
    parameters. `key` is the setting that names it. Raises ConfigError.
    """
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"{key}: {function!r:.80} is not a plain function, expected one made by def")
    name = function.__name__
    text, said = _docstring(inspect.getdoc(function) or "")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {
            f"p{n}": _field(p, hints, said, f"{key}: {name}")
            for n, p in enumerate(inspect.signature(function).parameters.values())
        }
        arguments = create_model(name, __config__=_STRICT, **fields)
        parameters = arguments.model_json_schema(schema_generator=_NoTitles)
    except (NameError, TypeError, PydanticSchemaGenerationError, PydanticUserError) as error:
        raise ConfigError(f"{key}: {name}: its types cannot be a JSON schema ({error!s:.120})") from error
    parameters.pop("title", None)
    parameters.pop("additionalProperties", None)
    schema = {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}
    return Function(name, schema, function, arguments)


_STRICT = ConfigDict(strict=True, extra="forbid")


class _NoTitles(GenerateJsonSchema):
    """Titles repeat the names, in the tokens of every prompt."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _field(p: inspect.Parameter, hints: dict[str, Any], said: dict[str, str], where: str) -> tuple[Any, FieldInfo]:
    if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
        raise ConfigError(f"{where}({p.name}): expected parameters that can be given by name")
    if p.name not in hints:
        raise ConfigError(f"{where}({p.name}): expected a type, such as {p.name}: str")
    default = ... if p.default is p.empty else p.default
    return hints[p.name], Field(default, alias=p.name, description=said.get(p.name))


def _read_texts(arguments: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """Read the arguments that are not what the schema says as JSON, where they are."""
    wrong = {str(e["loc"][0]) for e in error.errors(include_url=False)}
    read = dict(arguments)
    for name in wrong & arguments.keys():
        with suppress(ValueError, RecursionError):
            read[name] = json.loads(arguments[name])
    return read


def _fault(error: Any, takes: str) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"argument {where} is missing"
    if error["type"] == "extra_forbidden":
        return f"no argument {where}, {takes}"
    return f"argument {where}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into its first paragraph and what stands under `Args:`."""
    first = " ".join(text.partition("\n\n")[0].split())
    found = re.search(r"^(?:Args|Arguments|Parameters):[ ]*\n((?:[ \t]+.*\n?|[ \t]*\n)*)", text, re.MULTILINE)
    if found is None:
        return first, {}
    said: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc("\n" + found[1]).splitlines():
        start = re.match(r"\*{0,2}(\w+)[ ]*(?:\([^)]*\))?:[ ]*(.*)", line)
        if start is not None:
            name, said[start[1]] = start[1], start[2].strip()
        elif name and line.strip():
            said[name] = f"{said[name]} {line.strip()}".strip()
    return (first if not first.startswith(("Args:", "Arguments:", "Parameters:")) else ""), said
