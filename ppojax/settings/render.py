"""Writes settings as YAML that reads back to the same settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel


def scalar(value: Any) -> str:
    """Write a value, lists included, as one line of YAML."""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=float("inf"), allow_unicode=False)
    return text.removesuffix("\n").removesuffix("\n...")


def to_yaml(config: BaseModel, origins: Mapping[str, str] | None = None) -> str:
    """Write every setting as YAML, one a line; with `origins`, say after each where it was written."""
    return "\n".join(_lines(config, "", origins, 0)) + "\n"


def _lines(config: BaseModel, prefix: str, origins: Mapping[str, str] | None, depth: int) -> Iterator[str]:
    for name, value in config:
        key, indent = f"{prefix}{name}", "  " * depth
        if isinstance(value, BaseModel) and type(value).model_fields:
            yield f"{indent}{name}:"
            yield from _lines(value, f"{key}.", origins, depth + 1)
        else:
            comment = "" if origins is None else f"  # from {origins.get(key, 'default')}"
            yield f"{indent}{name}: {scalar(value)}{comment}"


def _plain(value: Any) -> Any:
    match value:
        case BaseModel():
            return {name: _plain(v) for name, v in value}
        case Enum():
            return value.value
        case Path():
            return str(value)
        case str():
            return value.replace("${", "\\${")  # OmegaConf would look up what stands in the braces
        case tuple() | list():
            return [_plain(v) for v in value]
        case frozenset():
            return sorted(_plain(v) for v in value)
    return value
