"""Help text, generated from the fields of the settings classes."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from textwrap import wrap
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ppojax.errors import ConfigError
from ppojax.settings.render import scalar
from ppojax.settings.schema import TAG, Model, by_tag, default_of, describe, keys, sections, tag_of

_WIDTH = 118


def help_text(cls: Model, section: str = "") -> str:
    """List the keys of a settings class with type, bounds, default and meaning.

    Without a section: the plain keys and the names of the sections. With one: everything below it, a union as one
    list for each `type`. Raises ConfigError, naming the nearest key, when there is no such section.
    """
    if not section:
        return "\n".join(_overview(cls)) + "\n"
    known = dict(keys(cls))
    if section not in known:
        near = get_close_matches(section, known, 1) or [k for k in known if k.endswith(f".{section}")][:1]
        advice = f"did you mean {near[0]}?" if near else "--help lists the sections"
        raise ConfigError(f"--help {section}: there is no such section or key; {advice}")
    return "\n".join(_entry(section, known[section], _inherited(cls, section))) + "\n"


def _overview(cls: Model) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        if not sections(field):
            yield from _leaf(name, field, default_of(field))
    yield ""
    yield "sections (--help SECTION):"
    for name, field in cls.model_fields.items():
        if classes := sections(field):
            tags = by_tag(classes)
            default = default_of(field)
            chosen = f" ({_default(default, field)})" if tags or default is None else ""
            yield f"  {name}{': ' if tags else ''}{' | '.join(tags)}{chosen}"
            yield from _prose(field.description or _first_line(classes[0]))


def _entry(path: str, field: FieldInfo, default: Any) -> Iterator[str]:
    """Describe one key: a plain value in two lines, a section with everything below it."""
    classes = sections(field)
    if not classes:
        yield from _leaf(path, field, default)
        return
    tags = by_tag(classes)
    yield f"  {path}: {describe(field)} ({_default(default, field)})"
    yield from _prose(field.description or _first_line(classes[0]))
    for variant in classes:
        if len(tags) > 1:
            yield ""
            yield f"  {path}.{TAG}={tag_of(variant)}: {_first_line(variant)}"
        values = dict(default) if isinstance(default, variant) else {}
        for name, sub in variant.model_fields.items():
            if name != TAG:
                yield from _entry(f"{path}.{name}", sub, values.get(name, default_of(sub)))


def _leaf(path: str, field: FieldInfo, default: Any) -> Iterator[str]:
    yield f"  {path}: {describe(field)} ({_default(default, field)})"
    yield from _prose(field.description or "")


def _prose(text: str) -> Iterator[str]:
    yield from wrap(" ".join(text.split()), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(default: Any, field: FieldInfo) -> str:
    if default is None and field.is_required():
        return "required"
    if isinstance(default, BaseModel):
        return f"default {tag_of(type(default)) or 'as below'}"
    return f"default {default if isinstance(default, str) and default else scalar(default)}"


def _first_line(cls: Model) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _inherited(cls: Model, path: str) -> Any:
    """Give the default of a key as it stands in the defaults of the sections around it."""
    field, value, classes = None, None, (cls,)
    for name in path.split("."):
        holder = next(c for c in classes if name in c.model_fields)
        values = dict(value) if isinstance(value, holder) else {}
        field = holder.model_fields[name]
        value, classes = values.get(name, default_of(field)), sections(field)
    return value
