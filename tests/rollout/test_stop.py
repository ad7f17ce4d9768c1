"""The stop table against a search of the text, on any tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppojax.rollout.stop import START, stop_table

BYTES = [b"", b"a", b"b", b"</", b"c>", b"ab", b"a</c", b">", b"</c>b", b"", b"\xc3", b"\xa9"]
EOS = 9


def stops_at(ids: list[int], stop: tuple[str, ...]) -> int | None:
    """Number of tokens written when the turn ends, found by searching the whole text after every token."""
    text = b""
    for n, i in enumerate(ids, start=1):
        text = text + BYTES[i] if BYTES[i] else b""  # a special token breaks a string in progress
        if i == EOS or any(s.encode() in text for s in stop):
            return n
    return None


def walk(table: np.ndarray, ids: list[int]) -> int | None:
    state = START
    for n, i in enumerate(ids, start=1):
        state = table[state, i]
        if state == len(table) - 1:
            return n
    return None


@pytest.mark.parametrize("stop", [("</c>",), ("ab", "</c>", "bb"), ("aab", "ab>", "a</"), ("\u00e9",), ()])
@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, len(BYTES) - 1), max_size=12))
def test_the_table_is_a_search_of_the_text(stop: tuple[str, ...], ids: list[int]) -> None:
    assert walk(stop_table(BYTES, stop, [EOS]), ids) == stops_at(ids, stop)


def test_a_string_may_span_tokens_or_lie_inside_one() -> None:
    table = stop_table(BYTES, ("</c>", "bb"), [EOS])
    assert walk(table, [1, 3, 4]) == 3  # a </ c>
    assert walk(table, [6, 7]) == 2  # a</c >
    assert walk(table, [8]) == 1  # </c>b
    assert walk(table, [5, 2]) == 2  # ab b
    assert walk(table, [3, 0, 4]) is None  # </ special c>
    assert walk(table, [1, EOS]) == 2


def test_stopped_is_never_left() -> None:
    table = stop_table(BYTES, ("ab",), [EOS])
    assert (table[-1] == len(table) - 1).all() and table.dtype == np.int32
