"""Builds a settings class from files and arguments, and reports every fault at once, one line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ppojax.component import Component
from ppojax.errors import ConfigError
from ppojax.settings.render import scalar, to_yaml
from ppojax.settings.schema import (
    TAG,
    Model,
    by_tag,
    default_of,
    describe,
    field_leaves,
    keys,
    literals,
    only_sections,
    sections,
    tag_of,
)
from ppojax.settings.sources import Origin, read_sources

_DEFERRED = "deferred"  # validation context: the loader reports contradictions itself


class Contradiction(NamedTuple):
    """Settings that are each legal and cannot hold together: their dotted keys, why, and what to change."""

    keys: tuple[str, ...]
    reason: str
    fix: str


class Settings(Component):
    """The root of a tree of settings: what a command is told."""

    foreign_keys: ClassVar[Mapping[str, str]] = {}  # keys of other libraries -> the key that means the same here

    @classmethod
    def base(cls, given: Mapping[str, Any]) -> Settings | None:
        """The settings over which those that are given are laid; None for the defaults."""
        return None

    def contradictions(self) -> Iterable[Contradiction]:
        """List the settings that cannot hold together."""
        return ()

    def to_yaml(self) -> str:
        """Write every setting as YAML that is itself a valid `config=` file."""
        return to_yaml(self)

    @model_validator(mode="after")
    def _agree(self, info: Any) -> Settings:  # a pydantic ValidationInfo, which beartype cannot check
        if not (info.context and info.context.get(_DEFERRED)):
            faults = [contradiction_text(self, c, {}) for c in self.contradictions()]
            if faults:
                raise ConfigError("\n".join(faults))
        return self


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """Settings, and where each key that is not a default was written."""

    config: S
    origins: Mapping[str, Origin]

    def annotated_yaml(self) -> str:
        """Write every setting as YAML, each with a comment that says where its value came from."""
        return to_yaml(self.config, {key: origin.where for key, origin in self.origins.items()})


def load_config(cls: type[S], arguments: Iterable[str], flags: Sequence[str] = ()) -> Loaded[S]:
    """Read `config=a.yaml,b.yaml` and `key.sub=value` arguments into a settings class.

    Files are merged left to right, arguments win over files. Where one gives a section another `type` than one before
    it, keys that only the earlier type has are left behind. `flags` are only named to who mistypes one.
    Raises ConfigError with one line for each unknown key, value that cannot be used, and contradiction.
    """
    sources = read_sources(arguments, flags)
    builder = _Builder(cls, sources.origins, sources.left_behind)
    config = builder.build(cls, sources.values, cls.base(sources.values), "")
    faults = [*sources.faults, *builder.unknown_keys(), *builder.faults]
    if not sources.faults:  # what could not be read may be what seems to be missing or contradictory
        faults += builder.missing_keys()
    if isinstance(config, cls) and not sources.faults:
        faults += [
            contradiction_text(config, c, sources.origins)
            for c in config.contradictions()
            if not any(_overlap(key, bad) for key in c.keys for bad in builder.faulty)
        ]
    if faults:
        raise ConfigError("\n".join(faults))
    assert isinstance(config, cls)
    return Loaded(config, sources.origins)


def contradiction_text(config: BaseModel, fault: Contradiction, origins: Mapping[str, Origin]) -> str:
    """Write a contradiction in one line: `a=1 (file:3), b=2 (default): reason; fix`."""
    values = []
    for key in fault.keys:
        value: Any = config
        for name in key.split("."):
            value = dict(value)[name]
        text = tag_of(type(value)) or "{...}" if isinstance(value, BaseModel) else scalar(value)
        where = f" ({_origin(origins, key).where})" if origins else ""
        values.append(f"{key}={text}{where}")
    return f"{', '.join(values)}: {fault.reason}; {fault.fix}"


def _overlap(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def _origin(origins: Mapping[str, Origin], key: str) -> Origin:
    """Find where a key was written: itself, or the first key below it."""
    if key in origins:
        return origins[key]
    return next((origin for below, origin in origins.items() if below.startswith(f"{key}.")), Origin("default"))


class _Builder:
    """Builds sections from the inside out, so that one faulty value hides no other."""

    def __init__(
        self, root: type[Settings], origins: Mapping[str, Origin], left_behind: frozenset[str] = frozenset()
    ) -> None:
        self.root = root
        self.origins = origins
        self.left_behind = left_behind
        self.faults: list[str] = []
        self.faulty: set[str] = set()  # keys whose value is not what the user meant: nothing is concluded from them
        self.unknown: list[str] = []
        self.missing: dict[str, str] = {}
        self.chosen: dict[str, Model] = {}

    def build(self, cls: Model, given: Mapping[Any, Any], base: BaseModel | None, path: str) -> BaseModel | None:
        """Build one section from what was given, over the values of `base`; None where that cannot be done."""
        inherited = dict(base) if isinstance(base, cls) else {}
        values: dict[str, Any] = {}
        for name, value in given.items():
            key, field = f"{path}{name}", cls.model_fields.get(str(name))
            if field is None or (isinstance(value, Mapping) and not sections(field)):
                self.unknown.append(_single(key, value))
            elif isinstance(value, Mapping):
                below = self._section(field, value, inherited.get(name, default_of(field)), key)
                if below is not None:
                    values[name] = below
            elif self._usable(field, value, key):
                values[name] = self._as_written(field, value, key)
        return self._validate(cls, inherited | values, path)

    def _section(self, field: FieldInfo, given: Mapping[Any, Any], base: Any, path: str) -> BaseModel | None:
        classes = sections(field)
        variants = by_tag(classes)
        if len(variants) != len(classes) or (len(classes) == 1 and TAG not in given):
            cls: Model | None = classes[0]
        elif TAG in given:
            cls = variants.get(self._spelled(given[TAG], f"{path}.{TAG}"))
        else:
            cls = type(base) if isinstance(base, classes) else None
        if cls is None:
            expected = " | ".join(variants)
            if TAG in given:
                self._fault(path, f"{self._shown(f'{path}.{TAG}', given[TAG])}: expected {expected}")
            else:
                self._fault(path, f"{path}.{TAG} is missing ({self._where(path)}): expected {expected}")
            return None
        self.chosen[path] = cls
        return self.build(cls, given, base, f"{path}.")

    def _usable(self, field: FieldInfo, value: Any, key: str) -> bool:
        """Refuse what pydantic would take without complaint, or complain of less clearly."""
        types = {leaf.annotation for leaf in field_leaves(field)}
        if value == "???":
            self._fault(key, f"{key} ({self._where(key)}) is left open: give it, {key}=..., as {describe(field)}")
        elif value is not None and only_sections(field):
            tags = by_tag(sections(field))
            example = f"{key}.{TAG}={value if value in tags else next(iter(tags))}" if tags else f"{key}.<key>=..."
            self._fault(key, f"{self._shown(key, value)}: {key} is a section; write {example}")
        elif isinstance(value, bool) and not types & {bool, str} and self._spelled(value, key) not in literals(field):
            self._fault(key, f"{self._shown(key, value)}: expected {describe(field)}")
        else:
            return True
        return False

    def _as_written(self, field: FieldInfo, value: Any, key: str) -> Any:
        """Undo YAML's reading of `off`, `1e3` or `2024` where the setting is a text."""
        if not isinstance(value, bool | int | float):
            return value
        types = {leaf.annotation for leaf in field_leaves(field)}
        allowed = literals(field)
        if type(value) in types or any(value == v and type(value) is type(v) for v in allowed):
            return value
        text = self._spelled(value, key)
        is_text = text in allowed or (str in types and not (types & {int, float} and not isinstance(value, bool)))
        return text if is_text else value

    def _validate(self, cls: Model, values: dict[str, Any], path: str) -> BaseModel | None:
        """Validate a section, leaving out the values that are refused, so that the rest can still be checked."""
        try:
            return cls.model_validate(values, context={_DEFERRED: True})
        except ConfigError as error:
            self._fault(path.rstrip("."), *(f"{path.rstrip('.')}: {line}" for line in str(error).splitlines()))
            return None
        except ValidationError as error:
            errors = error.errors(include_url=False)
        for name in dict.fromkeys(str(e["loc"][0]) for e in errors if e["loc"]):
            key, field = f"{path}{name}", cls.model_fields[name]
            first = next(e for e in errors if e["loc"] and e["loc"][0] == name)
            if name in values:
                self._fault(key, f"{self._shown(key, values[name])}: {_expectation(first, field)}")
            else:
                self.missing[key] = f"{key} is missing: expected {describe(field)}; {field.description or 'no default'}"
        for error in (e for e in errors if not e["loc"]):
            where = path.rstrip(".")
            self._fault(where, f"{where} ({self._where(where)}): {_message(error)}")
        kept = {k: v for k, v in values.items() if f"{path}{k}" not in self.faulty}
        try:
            return cls.model_validate(kept, context={_DEFERRED: True}) if len(kept) < len(values) else None
        except (ConfigError, ValidationError):
            return None

    def unknown_keys(self) -> list[str]:
        """Report the keys that no chosen variant has, each with the key that was probably meant."""
        known = dict(keys(self.root, self.chosen))
        told = [key for key in self.unknown if not (self._is_left_behind(key) and self._other_variant(key, known))]
        return [f"unknown key {key} ({self._where(key)}){self._advice(key, known)}" for key in told]

    def missing_keys(self) -> list[str]:
        """Report the keys that must be given and are not, save those for which a fault was reported."""
        # A section that lacks one of its keys is missing itself: the key says more.
        above = {key for key in self.missing if any(below.startswith(f"{key}.") for below in self.missing)}
        told = [key for key in self.missing if key not in above and not any(_overlap(key, k) for k in self.faulty)]
        return [self.missing[key] for key in told]

    def _advice(self, key: str, known: Mapping[str, FieldInfo]) -> str:
        if key in self.root.foreign_keys:
            return self._meant(self.root.foreign_keys[key])
        if variant := self._other_variant(key, known):
            path, tag = variant
            mine = f"{path}.{TAG}={tag_of(self.chosen[path])}"
            return f"; it belongs to {path}.{TAG}={tag}, not to {mine}: remove it, or change the type"
        leaf = key.rpartition(".")[2]
        same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
        near = get_close_matches(key, same_leaf, 1, 0.0) or get_close_matches(key, known, 1)
        return self._meant(near[0]) if near else "; --help lists the keys"

    def _is_left_behind(self, key: str) -> bool:
        written = [k for k in self.origins if k == key or k.startswith(f"{key}.")]
        return bool(written) and self.left_behind.issuperset(written)

    def _other_variant(self, key: str, known: Mapping[str, FieldInfo]) -> tuple[str, str] | None:
        """A section whose chosen variant lacks the key, and the type of one that has it."""
        for path, cls in self.chosen.items():
            for tag, other in by_tag(sections(known[path])).items():
                if other is not cls and key.startswith(f"{path}.") and key in dict(keys(other, None, f"{path}.")):
                    return path, tag
        return None

    def _meant(self, key: str) -> str:
        self.faulty.add(key)
        return f"; did you mean {key}?"

    def _fault(self, key: str, *texts: str) -> None:
        self.faulty.add(key)
        self.faults.extend(texts)

    def _where(self, key: str) -> str:
        return _origin(self.origins, key).where

    def _spelled(self, value: Any, key: str) -> str:
        text = self.origins[key].text if key in self.origins else None
        return scalar(value) if text is None or "${" in text else text

    def _shown(self, key: str, value: Any) -> str:
        text = " ".join(self._spelled(value, key).split())
        return f"{key}={text if len(text) <= 80 else text[:77] + '...'} ({self._where(key)})"


def _single(key: str, value: Any) -> str:
    """Follow a key down while it holds a single one: an unknown section of one key is that key."""
    while isinstance(value, Mapping) and len(value) == 1:
        [(name, value)] = value.items()
        key = f"{key}.{name}"
    return key


def _expectation(error: Any, field: FieldInfo) -> str:
    if error["type"] in ("value_error", "assertion_error"):
        return _message(error)
    if error["type"] == "extra_forbidden":
        return f"unknown key {error['loc'][-1]}"
    if error["type"] == "finite_number":
        return f"expected finite {describe(field)}"
    return f"expected {describe(field)}"


def _message(error: Any) -> str:
    text = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return " ".join(text.split())
