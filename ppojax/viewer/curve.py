"""The critic's value over the tokens of an episode, with the advantage beneath: as SVG, and as a line of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from ppojax.viewer.episode import Episode

_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
WIDTH, BINS = 1000, 500  # of the picture; a mean stands for the tokens that share a place
_VALUE, _ADVANTAGE, _GAP = 100, 60, 26  # heights
_LEFT = 60  # room for numbers


def pool(numbers: Sequence[float | None], bins: int) -> list[float | None]:
    """Means of up to `bins` runs of equal length; None where nothing is known."""
    n = len(numbers)
    bins = max(min(bins, n), 1)
    cuts = [n * b // bins for b in range(bins + 1)]
    parts = ([x for x in numbers[a:b] if x is not None] for a, b in pairwise(cuts))
    return [fmean(part) if part else None for part in parts]


def sparkline(numbers: Sequence[float | None], width: int, low: float, high: float) -> str:
    """Draw numbers with block characters, blank where nothing is known."""
    span = high - low
    top = len(_BLOCKS) - 1
    out = ""
    for x in pool(numbers, width):
        height = 0.0 if x is None or span <= 0 else min(max((x - low) / span, 0.0), 1.0)
        out += " " if x is None else _BLOCKS[round(top * height)]
    return out


def curve_svg(episode: Episode) -> str:
    """Draw value and advantage over the tokens of an episode, or nothing where neither was recorded.

    Lines stand where turns of the policy begin, thick ones where a compaction began a new row, circles at rewards.
    The band around the value is one standard deviation of the critics. All text in it is numbers of ours.
    """
    tokens = episode.tokens
    values = [token.value for token in tokens]
    advantages = [token.advantage for token in tokens]
    shown = [panel for panel in (_value_panel(episode, values), _advantage_panel(advantages)) if panel]
    if not shown:
        return ""
    heights = [_VALUE if "class=vl" in panel else _ADVANTAGE for panel in shown]
    total = sum(heights) + _GAP * len(shown)
    parts, top = [], 14
    for panel, height in zip(shown, heights, strict=True):
        parts.append(f'<g transform="translate(0 {top})">{panel}</g>')
        top += height + _GAP
    lines = _lines(episode, total - 14)
    return (
        f'<svg class=curve viewBox="0 0 {WIDTH} {total}" role=img '
        f'aria-label="value and advantage over {len(tokens)} tokens">{lines}{"".join(parts)}</svg>'
    )


def _x(i: float | int, n: int) -> str:
    return f"{_LEFT + (WIDTH - _LEFT - 4) * i / max(n, 1):.4g}"


def _range(numbers: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    return (low, high) if high > low else (low, low + 1.0)


def _axis(low: float, high: float, height: int, name: str) -> str:
    zero = height * high / (high - low)
    return (
        f"<text y=-3 class=name>{name}</text><text y=9>{high:.3g}</text><text y={height}>{low:.3g}</text>"
        f'<path class=zero d="M{_LEFT} {zero:.4g}H{WIDTH}"/>'
    )


def _value_panel(episode: Episode, values: list[float | None]) -> str:
    spreads = [token.spread for token in episode.tokens]
    mean, spread = pool(values, BINS), pool(spreads, BINS)
    if not any(x is not None for x in mean):
        return ""
    edges = [(x - (s or 0), x + (s or 0)) for x, s in zip(mean, spread, strict=True) if x is not None]
    low, high = _range([x for edge in edges for x in edge])
    n = len(mean)

    def y(x: float) -> str:
        return f"{_VALUE * (high - x) / (high - low):.4g}"

    runs = _runs(mean)
    line = "".join(
        "M" + "L".join(f"{_x(i + 0.5, n)} {y(x)}" for i, x in run) + ("h1" if len(run) == 1 else "") for run in runs
    )
    band = ""
    if any(spread):
        for run in runs:
            around = [(i, x, spread[i] or 0.0) for i, x in run]
            upper = [f"{_x(i + 0.5, n)} {y(x + s)}" for i, x, s in around]
            lower = [f"{_x(i + 0.5, n)} {y(x - s)}" for i, x, s in reversed(around)]
            band += "M" + "L".join(upper + lower) + "Z"
    count = f" (mean of {episode.critics} critics, with their deviation)" if episode.critics > 1 else ""
    rewards = "".join(
        f"<circle cx={_x(i + 0.5, len(episode.tokens))} cy={_VALUE} r=4 class={'up' if token.reward > 0 else 'dn'}>"
        f"<title>reward {token.reward:.6g}</title></circle>"
        for i, token in enumerate(episode.tokens)
        if token.reward
    )
    drawn = f'<path class=band d="{band}"/><path class=vl d="{line}"/>{rewards}'
    return _axis(low, high, _VALUE, f"value{count}{'; circles: rewards' if rewards else ''}") + drawn


def _advantage_panel(advantages: list[float | None]) -> str:
    pooled = pool(advantages, BINS)
    known = [x for x in pooled if x is not None]
    if not known:
        return ""
    low, high = _range(known)
    zero = _ADVANTAGE * high / (high - low)
    bars = {True: "", False: ""}
    for i, x in enumerate(pooled):
        if x:
            bars[x > 0] += f"M{_x(i + 0.5, len(pooled))} {zero:.4g}v{-_ADVANTAGE * x / (high - low):.4g}"
    width = max((WIDTH - _LEFT) / len(pooled) - 0.4, 0.8)
    drawn = "".join(
        f'<path class={"up" if up else "dn"} stroke-width="{width:.3g}" d="{path}"/>' for up, path in bars.items()
    )
    return _axis(low, high, _ADVANTAGE, "advantage") + drawn


def _runs(numbers: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Split into stretches without a gap."""
    runs: list[list[tuple[int, float]]] = [[]]
    for i, x in enumerate(numbers):
        if x is not None:
            runs[-1].append((i, x))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _lines(episode: Episode, height: int) -> str:
    n = len(episode.tokens)
    turns, cuts = "", ""
    for block in episode.blocks():
        if block.first and block.segment:
            cuts += f"M{_x(block.start, n)} 8v{height}"
        elif block.action:
            turns += f"M{_x(block.start, n)} 8v{height}"
    return f'<path class=turn d="{turns}"/><path class=cut d="{cuts}"/>'
