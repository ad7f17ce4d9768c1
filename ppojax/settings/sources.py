"""Reads settings from YAML files and the command line, remembering where each value was written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

COMMAND_LINE = "command line"
_MERGE = "tag:yaml.org,2002:merge"  # the key <<


class Origin(NamedTuple):
    """Where a value was written (`file:line` or `command line`) and, for a scalar, how it was spelled."""

    where: str
    text: str | None = None


class Sources(NamedTuple):
    """The merged values as nested dicts, where each was written, and what could not be read.

    `left_behind` are the keys of a section that were written before a later source gave it another `type`, or any where
    they were meant for the default.
    """

    values: dict[str, Any]
    origins: dict[str, Origin]
    faults: list[str]
    left_behind: frozenset[str] = frozenset()


def read_sources(arguments: Iterable[str], flags: Sequence[str] = ()) -> Sources:
    """Read and merge the files of every `config=a.yaml,b.yaml`, left to right, then the `key.sub=value` arguments."""
    faults: list[str] = []
    origins: dict[str, Origin] = {}
    layers: list[tuple[str, Any]] = []
    files: list[str] = []
    overrides: list[tuple[str, str]] = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if fault := _misspelled(argument, key, bool(equals), flags):
            faults.append(fault)
        elif key == "config":
            files.extend(text.split(","))
        else:
            overrides.append((key, text))
    for file in files:
        layers.append((file, _read_file(file, origins, faults)))
    for key, text in overrides:
        layers.append((f"{key}={text} ({COMMAND_LINE})", _read_override(key, text, origins, faults)))
    left_behind = _left_behind([layer for _, layer in layers], len(files))
    return Sources(_merge(layers, origins, faults), origins, faults, left_behind)


def _left_behind(layers: Sequence[Any], files: int) -> frozenset[str]:
    """Find them. A first type on the command line leaves only what files say: what stands beside it was meant."""
    written: dict[str, int] = {}
    named: dict[str, Any] = {}
    changed: dict[str, int] = {}  # sections -> the layer that gave another type
    for number, layer in enumerate(layers):
        for key, value in _leaves(OmegaConf.to_container(OmegaConf.create(layer))):
            written[key] = number
            section, _, name = key.rpartition(".")
            if name == "type":
                if named.get(section) != value:
                    changed[section] = number if section in named else min(number, files)
                named[section] = value
    return frozenset(
        key
        for key, number in written.items()
        if any(key.startswith(f"{section}.") and number < at for section, at in changed.items())
    )


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _merge(layers: list[tuple[str, Any]], origins: Mapping[str, Origin], faults: list[str]) -> dict[str, Any]:
    """Merge the layers and look up `${...}`, leaving out each key for which that fails."""
    merged: Any = OmegaConf.create({})
    for label, layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except TypeError:
            faults.append(f"{label}: puts keys where a list was given before, or a list where keys were")
    while True:
        try:
            values = OmegaConf.to_container(merged, resolve=True)
        except OmegaConfBaseException as error:
            key = str(error.full_key).partition("[")[0]
            where = f" ({origins[key].where})" if key in origins else ""
            faults.append(f"{key}{where}: {_first_line(error)}")
            section, _, name = key.rpartition(".")
            del (OmegaConf.select(merged, section) if section else merged)[name]
        else:
            assert isinstance(values, dict)
            return {str(key): value for key, value in values.items()}


def _misspelled(argument: str, key: str, has_value: bool, flags: Sequence[str]) -> str | None:
    if argument.startswith("-"):
        if has_value:
            return f"unknown flag {argument}; values are written key=value: {argument.lstrip('-')}"
        near = get_close_matches(argument, flags, n=1)
        return f"unknown flag {argument}; " + (f"did you mean {near[0]}?" if near else f"flags are {', '.join(flags)}")
    if not has_value or not all(key.split(".")):
        return f"cannot read the argument {argument!r}; expected key=value, for example run.name=first"
    return None


def _read_override(key: str, text: str, origins: dict[str, Origin], faults: list[str]) -> dict[str, Any]:
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except yaml.YAMLError:
        faults.append(f"{key}={text} ({COMMAND_LINE}): not a YAML value; quote it, or balance its brackets")
        return {}
    except OmegaConfBaseException as error:
        faults.append(f"{key}={text} ({COMMAND_LINE}): {_first_line(error)}; a literal ${{ is written \\${{")
        return {}
    assert isinstance(parsed, dict)
    value = parsed["value"]
    _record(origins, key, value, Origin(COMMAND_LINE, text))
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _record(origins: dict[str, Origin], key: str, value: Any, origin: Origin) -> None:
    if isinstance(value, Mapping) and value:
        origins.pop(key, None)
        for name, sub in value.items():
            _record(origins, f"{key}.{name}", sub, Origin(origin.where))
    else:
        _forget(origins, key)
        origins[key] = origin


def _forget(origins: dict[str, Origin], key: str) -> None:
    parts = key.split(".")
    for ancestor in (".".join(parts[:n]) for n in range(1, len(parts))):
        origins.pop(ancestor, None)
    for below in [k for k in origins if k.startswith(f"{key}.")]:
        del origins[below]


def _read_file(file: str, origins: dict[str, Origin], faults: list[str]) -> Any:
    argument = f"config={file} ({COMMAND_LINE})"
    try:
        text = Path(file).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        faults.append(f"{argument}: there is no such file")
        return {}
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{argument}: cannot be read: {error}")
        return {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        faults.append(f"{file}{line}: not YAML: {error.problem}")
        return {}
    except yaml.YAMLError as error:
        faults.append(f"{file}: not YAML: {' '.join(str(error).split())}")
        return {}
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        faults.append(f"{file}:{root.start_mark.line + 1}: expected keys and values (key: value) at the top level")
        return {}
    before = len(faults)
    _locate(root, file, "", origins, faults)
    if len(faults) > before:
        return {}  # OmegaConf would stop at the first of them
    try:
        return OmegaConf.create(text)
    except OmegaConfBaseException as error:
        where = origins[error.full_key].where if error.full_key in origins else file
        faults.append(f"{where}: {_first_line(error)}; a literal ${{ is written \\${{")
        return {}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _locate(node: yaml.MappingNode, file: str, prefix: str, origins: dict[str, Origin], faults: list[str]) -> None:
    """Note the line of every key of a file; report keys that are given twice or cannot be keys."""
    lines: dict[str, int] = {}
    for key_node, value_node in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):
        line = key_node.start_mark.line + 1
        name = str(key_node.value)
        key = f"{prefix}{name}"
        if key_node.tag == _MERGE:
            merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for shared in merged:
                _locate(shared, file, prefix, origins, faults)
        elif not isinstance(key_node, yaml.ScalarNode) or "." in name:
            faults.append(f"{file}:{line}: cannot read the key {name!r}; nest keys instead of joining them with dots")
        elif name in lines:
            faults.append(f"{file}:{line}: duplicate key {key}, first given at line {lines[name]}; keep one of them")
        elif isinstance(value_node, yaml.MappingNode) and value_node.value:
            lines[name] = line
            origins.pop(key, None)
            _locate(value_node, file, f"{key}.", origins, faults)
        else:
            lines[name] = line
            spelled = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
            _forget(origins, key)
            origins[key] = Origin(f"{file}:{line}", spelled)
            for index, item in enumerate(value_node.value if isinstance(value_node, yaml.SequenceNode) else ()):
                if isinstance(item, yaml.MappingNode):
                    _locate(item, file, f"{key}.{index}.", origins, faults)
