"""What a token's colour says: a number becomes a level, a level a colour, alike on the terminal and on a page."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from ppojax.viewer.episode import Token
from ppojax.viewer.records import Record

Quantity = Literal["advantage", "value", "ratio", "mask"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
LEVELS = 5  # of a colour, on each side of none

TRAINED, NO_GRADIENT, HELD = 1, 2, 3  # levels of the mask
MASKS = {TRAINED: "trained", NO_GRADIENT: "no gradient: failed episode, or advantage 0", HELD: "outside trust region"}

Rgb = tuple[int, int, int]
# Each pair is told apart by colour-blind eyes too.
_BELOW: dict[Quantity, Rgb] = {"advantage": (224, 93, 20), "ratio": (150, 72, 190)}
_ABOVE: dict[Quantity, Rgb] = {"advantage": (22, 130, 200), "ratio": (24, 140, 70), "value": (190, 140, 10)}
_MASK: dict[int, Rgb] = {TRAINED: (22, 130, 200), NO_GRADIENT: (128, 128, 128), HELD: (224, 93, 20)}


class Scale(NamedTuple):
    """The numbers that full colours stand for. One scale serves a whole step, so that its episodes compare."""

    advantage: float = 1.0
    log_ratio: float = 1.0
    low: float = 0.0  # of the values
    high: float = 1.0


class ScaleSums:
    """Gathers the scale of a step, row by row: twice the root mean square of advantage and log-ratio; the values'
    range."""

    def __init__(self) -> None:
        self._squares = {"advantage": (0.0, 0), "log_ratio": (0.0, 0)}
        self._low, self._high = math.inf, -math.inf

    def add(self, record: Record) -> None:
        """Take in the actions of a row."""
        action = record.action
        self._add("advantage", [a for a, on in zip(record.advantage or (), action, strict=False) if on and a])
        logs = [_log(r) for r, on in zip(record.ratio or (), action, strict=False) if on]
        self._add("log_ratio", [log for log in logs if log and math.isfinite(log)])
        for value in record.value or ():
            known = [v for v, on in zip(value, action, strict=True) if on and v is not None]
            self._low, self._high = min([self._low, *known]), max([self._high, *known])

    def _add(self, name: str, numbers: list[float]) -> None:
        total, count = self._squares[name]
        self._squares[name] = total + sum(x * x for x in numbers), count + len(numbers)

    def scale(self) -> Scale:
        """The scale of all rows so far. Noise of rounding gets no full colour."""
        rms = {name: math.sqrt(total / count) if count else 0.0 for name, (total, count) in self._squares.items()}
        low, high = (self._low, self._high) if self._low <= self._high else (0.0, 1.0)
        return Scale(max(2 * rms["advantage"], 1e-6), max(2 * rms["log_ratio"], 1e-3), low, high)


def level(quantity: Quantity, token: Token, scale: Scale) -> int:
    """Give the level of a token, 0 for none and for what the policy did not choose.

    -LEVELS to LEVELS for advantage and ratio, 0 to LEVELS for the value, one of `MASKS` for the mask.
    """
    if not token.action:
        return 0
    if quantity == "mask":
        if not token.trained or token.advantage == 0:
            return NO_GRADIENT
        return HELD if token.held else TRAINED
    if quantity == "value":
        width = scale.high - scale.low
        inside = 0.0 if token.value is None or width <= 0 else (token.value - scale.low) / width
        return round(LEVELS * min(max(inside, 0.0), 1.0))
    x = (token.advantage or 0.0) / scale.advantage if quantity == "advantage" else _log(token.ratio) / scale.log_ratio
    return round(LEVELS * min(max(x, -1.0), 1.0))


def colour(quantity: Quantity, level: int) -> tuple[Rgb, float]:
    """Give the colour of a level that is not 0, and how much of it is laid over the background (0 to 1)."""
    if quantity == "mask":
        return _MASK[level], 0.5
    return (_ABOVE if level > 0 else _BELOW)[quantity], 0.15 + 0.6 * abs(level) / LEVELS


def legend(quantity: Quantity, scale: Scale) -> list[tuple[int, str]]:
    """Name levels, from the lowest to the highest, for people."""
    if quantity == "mask":
        return list(MASKS.items())
    if quantity == "value":
        return [(0, f"{scale.low:.3g}"), (LEVELS, f"{scale.high:.3g}")]
    if quantity == "advantage":
        return [(-LEVELS, f"{-scale.advantage:.3g}"), (0, "0"), (LEVELS, f"{scale.advantage:+.3g}")]
    return [(sign * LEVELS, f"{math.exp(sign * scale.log_ratio):.6g}") for sign in (-1, 0, 1)]


def _log(ratio: float | None) -> float:
    """The logarithm of a ratio; 0 for one that is not known."""
    if ratio is None:
        return 0.0
    return math.log(ratio) if ratio > 0 else -math.inf
