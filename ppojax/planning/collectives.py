"""Which collectives a compiled program has: how often, over which axes of the mesh, and how many bytes they move."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16}  # bytes of a number; of the others from their names


class Collective(NamedTuple):
    """All collectives of one kind over the same axes.

    Attributes:
        axes: axes of the mesh along which devices talk; `?` where the program's notation is not understood.
        count: how often, loops with a known number of turns multiplied out.
        bytes: that each device sends in all, with ring algorithms.
        turn: whether they are inside a loop whose turns are known only as it runs, such as that over decoded tokens;
            count and bytes are then of one turn.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    turn: bool = False


def collectives(text: str, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """Find the collectives in the text of a compiled program, whose devices are those of a mesh in its order.

    Each device sends, of the whole of n devices' data x: all-gather and reduce-scatter (n - 1)/n x, all-reduce twice
    that, all-to-all (n - 1)/n of its own, a permute all of its own. Ragged exchanges are counted as if their buffers
    were full.
    """
    bodies = dict(_computations(text))
    found: dict[tuple[str, tuple[str, ...], bool], list[float]] = defaultdict(lambda: [0, 0.0])
    for name, (times, turn) in _visits(bodies, _entry(text)).items():
        for line in bodies[name]:
            got = _read(line, mesh)
            if got is not None:
                total = found[(got.kind, got.axes, turn)]
                total[0] += times * got.count
                total[1] += times * got.bytes
    return tuple(Collective(k, a, int(n), size, turn) for (k, a, turn), (n, size) in sorted(found.items()))


_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OPERATION = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def _entry(text: str) -> str:
    found = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert found is not None, "the text of a program has an entry"
    return found.group(1)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        head = None if line.startswith(" ") else _HEAD.match(line)
        if head is not None:
            name, lines = head.group(1), []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _visits(bodies: Mapping[str, list[str]], entry: str) -> dict[str, tuple[int, bool]]:
    """How often each computation runs; True with those whose number is that of one turn of an open loop."""
    visits: dict[str, tuple[int, bool]] = {}

    def visit(name: str, times: int, turn: bool) -> None:
        before = visits.get(name, (0, False))
        visits[name] = before[0] + times, before[1] or turn
        for line in bodies[name]:
            loop = " while(" in line
            trips = _trips(line, bodies) if loop else None
            each = times * (trips or 1)
            branches = [part for found in _BRANCHES.findall(line) for part in re.findall(r"[\w.\-]+", found)]
            for called in [*_CALLED.findall(line), *branches]:
                if called in bodies and "=" in line:
                    visit(called, each, turn or (loop and trips is None))

    visit(entry, 1, False)
    return visits


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int | None:
    """How often a loop goes round: as the compiler says, or by a condition that only compares with a constant."""
    found = _TRIPS.search(line)
    if found is not None:
        return int(found.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = list(bodies[condition.group(1)]) if condition is not None else []
    for inner in [name for part in lines for name in _CALLED.findall(part)]:
        lines += bodies.get(inner, [])
    text = "\n".join(lines)
    limits = re.findall(r"[su]32\[\](?:\{[^}]*\})? constant\((\d+)\)", text)
    plain = "direction=LT" in text and not re.search(r" (and|or)\(", text)
    return int(limits[0]) if plain and len(limits) == 1 else None


def _read(line: str, mesh: Mapping[str, int]) -> Collective | None:
    found = _OPERATION.search(line)
    if found is None:
        return None
    shapes, kind, started = found.groups()
    groups = _groups(line, math.prod(mesh.values()))
    axes, n = (("?",), 2) if groups is None else _axes(groups, mesh)
    if n < 2:
        return None
    size = sum(_bytes(*shape) for shape in _SHAPE.findall(shapes))
    if started:  # what is started holds what goes in, too, but for all-reduce
        size *= {"all-gather": n / (n + 1), "reduce-scatter": 1 / (n + 1), "all-reduce": 1.0}.get(kind, 0.5)
    share = (n - 1) / n
    sent = {
        "all-gather": share * size,
        "reduce-scatter": (n - 1) * size,
        "all-reduce": 2 * share * size,
        "collective-permute": size,
    }.get(kind, share * size)
    return Collective(kind, axes, 1, sent)


def _bytes(kind: str, dims: str) -> int:
    bits = re.search(r"\d+", kind)
    width = WIDTHS.get(kind) or (max(int(bits.group()) // 8, 1) if bits else 0)
    return width * math.prod(int(d) for d in dims.split(",") if d)


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes along which the devices of a group differ, and how many these are."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, members]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, d in zip(mesh, differ, strict=True) if d), groups.shape[1]


_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")


def _groups(line: str, devices: int) -> np.ndarray | None:
    """Devices that talk to each other, `[groups, members]`; None where that cannot be read."""
    if found := _IOTA.search(line):
        count, size, dims, order = found.groups()
        return _iota(dims, order, devices).reshape(int(count), int(size))
    if found := _LISTED.search(line) or _PAIRS.search(line):
        listed = [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found.group(1))]
        return np.array(listed) if len({len(group) for group in listed}) == 1 else None
    if found := _NAMED.search(line):
        axes, dims, order, over = found.groups()
        groups = _of_named(axes, over, devices)
        return groups if groups is None or dims is None else _iota(dims, order, devices).reshape(-1)[groups]
    return np.arange(devices)[None] if "replica_groups={}" in line else None


def _iota(dims: str, order: str | None, devices: int) -> np.ndarray:
    """Devices in the order `[dims]T(order)`: numbered along dims, then read along their axes in that order."""
    ids = np.arange(devices).reshape([int(d) for d in dims.split(",")])
    return ids.transpose([int(d) for d in order.split(",")]) if order else ids


def _of_named(axes: str, over: str, devices: int) -> np.ndarray | None:
    """Groups along named axes, whole (`'x'`) or in part (`'x':(2)4`: 2 devices of it before, 4 of it)."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    if math.prod(sizes.values()) != devices:
        return None
    shape, chosen = [], []
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)}
    for name, size in sizes.items():
        before, inner = (int(x) if x else None for x in parts.get(name, ("", "")))
        split = [size] if before is None or inner is None else [before, inner, size // (before * inner)]
        if name in parts:
            chosen.append(len(shape) + (1 if len(split) == 3 else 0))
        shape += split
    rest = [d for d in range(len(shape)) if d not in chosen]
    members = math.prod(shape[d] for d in chosen)
    return np.arange(devices).reshape(shape).transpose(rest + chosen).reshape(-1, members)
