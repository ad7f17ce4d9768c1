"""Charts as SVG, written by hand: small, in ink on paper of either colour, told apart without colour too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from ppojax.viewer.characters import one_line

WIDTH, HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 22, 34
# Light, dark. After Okabe and Ito, for colour-blind eyes; where they come again, dashes tell them apart.
_COLOURS = (
    ("#0072b2", "#56a8e0"),
    ("#c8500a", "#f08a4b"),
    ("#00835f", "#2fc79c"),
    ("#a8497f", "#dd94bd"),
    ("#8a6d00", "#e5b93c"),
    ("#3b3f46", "#c9ced6"),
)
_DASHES = ("none", "7 3", "2 2", "9 2 2 2", "5 2 1 2 1 2")
PARTS = ("gen", "env_wait", "sync", "values", "update_critic", "update_actor", "rest")
PART_COLOURS = ("#0072b2", "#56b4e9", "#f0e442", "#cc79a7", "#009e73", "#d55e00", "#999999")


class Series(NamedTuple):
    """A line of a chart, with a band around it, and fainter lines behind it."""

    name: str
    slot: int  # which colour and dash
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    behind: Sequence[tuple[np.ndarray, np.ndarray]] = ()
    dots: bool = False


def text(words: str) -> str:
    """Write words as markup."""
    return escape(one_line(words))


def style() -> str:
    """Write the rules that charts need on a page."""
    light = ";".join(f"--m{i}:{a}" for i, (a, _) in enumerate(_COLOURS))
    dark = ";".join(f"--m{i}:{b}" for i, (_, b) in enumerate(_COLOURS))
    rules = [f":root{{{light}}}", f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"]
    rules += [
        ".chart{width:100%;height:auto;max-width:30rem}",
        ".chart text,.bars text{font:11px sans-serif;fill:var(--soft)}",
        ".chart .name,.bars .name{fill:var(--ink)}",
        ".chart path,.chart line{fill:none;stroke:var(--line)}",
        ".chart .s{stroke-width:2;stroke-linejoin:round}",
        ".chart .r{stroke-width:1;opacity:.35}",
        ".chart .f{opacity:.18;stroke:none}",
        ".bars{width:100%;height:auto}.bars rect{stroke:var(--paper)}",
    ]
    for i in range(len(_COLOURS)):
        rules.append(f".chart .c{i}{{stroke:var(--m{i})}}.chart .f.c{i},.chart circle.c{i}{{fill:var(--m{i})}}")
    rules += [f".chart .d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(_DASHES) if i]
    rules += [f".bars .p{i}{{fill:{colour}}}" for i, colour in enumerate(PART_COLOURS)]
    return "\n".join(rules)


def classes(slot: int) -> str:
    """Name the colour and the dash of a method."""
    return f"c{slot % len(_COLOURS)} d{(slot + slot // len(_COLOURS)) % len(_DASHES)}"


def line_chart(
    series: Sequence[Series], *, title: str, x_name: str, y_name: str = "", diagonal: bool = False, within: bool = False
) -> str:
    """Draw lines over x. `diagonal` adds y = x; `within` leaves out what is below -1, as of explained variances."""
    series = [one for one in map(_known, series) if len(one.x) or one.behind]
    drawn = [(one.x, one.y) for one in series] + [line for one in series for line in one.behind]
    bands = [(one.x, edge) for one in series for edge in (one.low, one.high) if edge is not None]
    if not drawn:
        return ""
    x_low, x_high = _span(np.concatenate([x for x, _ in drawn]))
    y_low, y_high = _span(np.concatenate([y for _, y in drawn + bands]), floor=-1.0 if within else -math.inf)
    if diagonal:
        y_low, y_high = min(x_low, y_low), max(x_high, y_high)

    def place(x: np.ndarray, y: np.ndarray) -> str:
        across = _LEFT + (WIDTH - _LEFT - _RIGHT) * (x - x_low) / (x_high - x_low)
        down = _TOP + (HEIGHT - _TOP - _BOTTOM) * (y_high - np.clip(y, y_low, y_high)) / (y_high - y_low)
        return "L".join(f"{a:.5g} {b:.4g}" for a, b in zip(across, down, strict=True))

    parts = [f'<svg class=chart viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{text(title)}">']
    parts.append(f"<text class=name x={_LEFT} y=12>{text(title)}</text>")
    parts.append(_axes(x_low, x_high, y_low, y_high, x_name, y_name))
    if diagonal:
        ends = np.array([max(x_low, y_low), min(x_high, y_high)])
        parts.append(f'<path d="M{place(ends, ends)}"><title>value = return</title></path>')
    for one in series:
        parts += [f'<path class="r {classes(one.slot)}" d="M{place(*line)}"/>' for line in one.behind if len(line[0])]
    for one in series:
        parts.append(_drawn(one, place))
    return "".join(parts) + "</svg>"


def _known(one: Series) -> Series:
    kept = np.isfinite(one.x) & np.isfinite(one.y)
    low, high = (None if edge is None else edge[kept] for edge in (one.low, one.high))
    return one._replace(x=one.x[kept], y=one.y[kept], low=low, high=high)


def _drawn(one: Series, place: Callable[[np.ndarray, np.ndarray], str]) -> str:
    colour = classes(one.slot)
    out = ""
    if one.low is not None and one.high is not None and len(one.x) > 1:
        around = place(one.x, one.low) + "L" + place(one.x[::-1], one.high[::-1])
        out += f'<path class="f {colour}" d="M{around}Z"/>'
    if len(one.x) > 1:
        out += f'<path class="s {colour}" d="M{place(one.x, one.y)}"><title>{text(one.name)}</title></path>'
    for x, y in zip(one.x, one.y, strict=True) if one.dots or len(one.x) == 1 else ():
        across, down = place(np.array([x]), np.array([y])).split()
        said = f"{text(one.name)}: {x:.4g}, {y:.4g}"
        out += f"<circle class={colour.split()[0]} cx={across} cy={down} r=3><title>{said}</title></circle>"
    return out


def _span(numbers: np.ndarray, floor: float = -math.inf) -> tuple[float, float]:
    known = numbers[np.isfinite(numbers)]
    low, high = (max(float(known.min()), floor), max(float(known.max()), floor)) if len(known) else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) * 0.1 or 0.5
        return low - room, high + room
    return low, high


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within a range."""
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(x: float) -> str:
    """Write a number in few letters: 1.2M for 1200000."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{x:.4g}" if abs(x) > 1e-12 else "0"


def _axes(x_low: float, x_high: float, y_low: float, y_high: float, x_name: str, y_name: str) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    out = ""
    for y in ticks(y_low, y_high):
        at = _TOP + (bottom - _TOP) * (y_high - y) / (y_high - y_low)
        out += f'<path d="M{_LEFT} {at:.4g}H{right}"/>'
        out += f"<text x={_LEFT - 4} y={at + 4:.4g} text-anchor=end>{short(y)}</text>"
    for x in ticks(x_low, x_high):
        at = _LEFT + (right - _LEFT) * (x - x_low) / (x_high - x_low)
        out += f'<path d="M{at:.4g} {bottom}v4"/><text x={at:.4g} y={bottom + 15} text-anchor=middle>{short(x)}</text>'
    said = f"{x_name}; up: {y_name}" if y_name else x_name
    return out + f"<text x={right} y={HEIGHT - 4} text-anchor=end>{text(said)}</text>"


def bar_chart(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Draw stacked bars, one a row; the parts are `PARTS`, in seconds."""
    width, height, room = 900, 26, 18
    longest = max(sum(parts) for _, parts in rows) or 1.0
    out = [f'<svg class=bars viewBox="0 0 {width} {len(rows) * (height + room)}" role=img aria-label="seconds a step">']
    for n, (name, parts) in enumerate(rows):
        top = n * (height + room)
        out.append(f"<text class=name x=0 y={top + 13}>{text(name)}: {sum(parts):.3g} s</text>")
        at = 0.0
        for i, seconds in enumerate(parts):
            across = (width - 2) * seconds / longest
            if seconds > 0:
                said = f"{PARTS[i]} {seconds:.3g} s"
                out.append(f"<rect class=p{i} x={at:.5g} y={top + room} width={across:.4g} height={height - 6}>")
                out.append(f"<title>{said}</title></rect>")
            at += across
    return "".join(out) + "</svg>"
