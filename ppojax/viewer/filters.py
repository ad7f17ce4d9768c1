"""Which episodes of a step are listed: words that a person types."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from ppojax.types import Ending
from ppojax.viewer.run import Summary

Filter = Callable[[Summary], bool]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_NUMBERS: dict[str, Callable[[Summary], float]] = {
    "reward": lambda summary: summary.reward,
    "turns": lambda summary: summary.turns,
    "tokens": lambda summary: summary.tokens,
    "rows": lambda summary: len(summary.places),
    "group": lambda summary: summary.group,
    "episode": lambda summary: summary.number,
}
_ENDINGS = {ending.name.lower(): ending.name.lower() for ending in Ending} | {"failed": "error"}
_COMPARISON = re.compile(rf"({'|'.join(_NUMBERS)})(!=|<=|>=|=|<|>)(.*)")

HELP = (
    "words that all hold: failed, terminated, truncated, cut; reward>0.5 (= != < <= > >=; turns, tokens, rows, group, "
    "episode likewise); any other word is looked for in the text; !word is the opposite"
)


def parse_filter(text: str) -> Filter:
    """Read a filter; nothing passes everything. Raises ValueError, for the person who typed it."""
    terms = [_term(word) for word in text.split()]
    return lambda summary: all(term(summary) for term in terms)


def _term(word: str) -> Filter:
    if word.startswith("!") and len(word) > 1:
        positive = _term(word[1:])
        return lambda summary: not positive(summary)
    if word in _ENDINGS:
        return lambda summary: summary.ending == _ENDINGS[word]
    if found := _COMPARISON.fullmatch(word):
        name, sign, number = found.groups()
        try:
            limit = float(number)
        except ValueError:
            raise ValueError(f"{word}: {number or 'nothing'} is no number") from None
        return lambda summary: _OPERATORS[sign](_NUMBERS[name](summary), limit)
    looked_for = word.casefold()
    return lambda summary: looked_for in summary.text.casefold()
