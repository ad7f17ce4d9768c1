"""What a settings class accepts, read off its fields: keys, variants, types and bounds as text."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types as at
from pydantic import AllowInfNan, BaseModel
from pydantic.fields import FieldInfo

Model = type[BaseModel]
TAG = "type"

_NAMES = {int: "int", float: "float", bool: "bool", str: "str", Path: "path", types.NoneType: "null"}


class Leaf(NamedTuple):
    """One alternative of an annotation: a plain type, a generic, or a `Literal`, with the bounds that hold for it."""

    annotation: Any
    bounds: tuple[Any, ...]


def leaves(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[Leaf]:
    """Yield the alternatives of an annotation; bounds around a union hold for each of its members."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        yield from leaves(inner, (*metadata, *_flat(extra)))
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from leaves(member, metadata)
    else:
        yield Leaf(annotation, metadata)


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _flat(item.metadata)
        elif isinstance(item, at.GroupedMetadata):
            yield from item
        else:
            yield item


def field_leaves(field: FieldInfo) -> tuple[Leaf, ...]:
    """List the alternatives of a field."""
    return tuple(leaves(field.annotation, tuple(_flat(field.metadata))))


def literals(field: FieldInfo) -> tuple[Any, ...]:
    """List the literal values that a field may take."""
    return tuple(v for leaf in field_leaves(field) if get_origin(leaf.annotation) is Literal for v in get_args(leaf[0]))


def sections(field: FieldInfo) -> tuple[Model, ...]:
    """List the settings classes that a field may hold: none for a plain value, several for a union on `type`."""
    plain = (leaf.annotation for leaf in field_leaves(field) if isinstance(leaf.annotation, type))
    return tuple(a for a in plain if issubclass(a, BaseModel))


def only_sections(field: FieldInfo) -> bool:
    """Tell whether a field takes nothing but a section or null."""
    return len(sections(field)) == sum(leaf.annotation is not types.NoneType for leaf in field_leaves(field))


def tag_of(cls: Model) -> str | None:
    """Give the value of `type` that stands for a settings class; None for a class without variants."""
    values = literals(cls.model_fields[TAG]) if TAG in cls.model_fields else ()
    return str(values[0]) if values else None


def by_tag(classes: tuple[Model, ...]) -> dict[str, Model]:
    """Index the variants of a union by their `type`."""
    return {tag: cls for cls in classes if (tag := tag_of(cls)) is not None}


def default_of(field: FieldInfo) -> Any:
    """Give the default of a field, None where it has none."""
    return None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def keys(cls: Model, chosen: Mapping[str, Model] | None = None, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key below a settings class, sections before what they hold.

    A section found in `chosen` yields the keys of that class only; any other yields those of all its variants.
    """
    for name, field in cls.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field
        seen: set[str] = set()
        picked = (chosen[path],) if chosen and path in chosen else sections(field)
        for variant in picked:
            for key, sub in keys(variant, chosen, f"{path}."):
                if key not in seen:
                    seen.add(key)
                    yield key, sub


def describe(field: FieldInfo) -> str:
    """Say what a field accepts: `int >= 1`, `float > 0 | null`, `tv | kl`, `list of str`."""
    return " | ".join(dict.fromkeys(_leaf_text(leaf) for leaf in field_leaves(field)))


def _leaf_text(leaf: Leaf) -> str:
    annotation, origin, args = leaf.annotation, get_origin(leaf.annotation), get_args(leaf.annotation)
    if origin is Literal:
        return " | ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in args)
    if origin in (tuple, list, frozenset):
        return _bounded(f"list of {_items_text(args)}", leaf.bounds)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return tag_of(annotation) or "section"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(member.value) for member in annotation)
    name = _NAMES.get(annotation, str(annotation))
    return name if annotation in (bool, types.NoneType) else _bounded(name, leaf.bounds)


def _items_text(args: tuple[Any, ...]) -> str:
    if len(args) == 2 and args[1] is Ellipsis:
        args = args[:1]
    return ", ".join(" | ".join(map(_leaf_text, leaves(a))) for a in args)


def _bounded(name: str, bounds: tuple[Any, ...]) -> str:
    texts = []
    for bound in bounds:
        match bound:
            case at.Gt(gt=x):
                texts.append(f"> {x}")
            case at.Ge(ge=x):
                texts.append(f">= {x}")
            case at.Lt(lt=x):
                texts.append(f"< {x}")
            case at.Le(le=x):
                texts.append(f"<= {x}")
            case at.MultipleOf(multiple_of=x):
                texts.append(f"a multiple of {x}")
            case at.MinLen(min_length=n):
                texts.append(f"of length >= {n}")
            case at.MaxLen(max_length=n):
                texts.append(f"of length <= {n}")
            case AllowInfNan(allow_inf_nan=True):
                texts.append("up to inf")
    return f"{name} {' and '.join(texts)}" if texts else name
