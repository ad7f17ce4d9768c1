"""The stop table against a search of the text, on any tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from ppojax.models.chat import ChatTemplate
from ppojax.models.tokenizer import Tokenizer
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


TEMPLATE = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
STOP = ("</calc>", "\n\nUser:", "\u00e9t\u00e9")
PIECES = ["</calc", "</", "c", ">", "alc>", " is", "\n", "\u00e9t", "\u00e9", "User:", "</code>", "<calc>1", *STOP]


class Bpe(NamedTuple):
    """A byte-level BPE trained on a few lines, the bytes of its tokens, and its stop table."""

    tokenizer: tokenizers.Tokenizer
    token_bytes: list[bytes]
    table: np.ndarray


@pytest.fixture(scope="module")
def bpe() -> Bpe:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=272,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_end|>"],
        show_progress=False,
    )
    lines = ["so <calc>12+34</calc> is 46.", "</calculator></code>", "caf\u00e9 d'\u00e9t\u00e9.\n\nUser: why\n"]
    tokenizer.train_from_iterator(lines * 9, trainer)
    token_bytes = Tokenizer(tokenizer, ChatTemplate(TEMPLATE), eos_ids=[0]).token_bytes()
    return Bpe(tokenizer, token_bytes, stop_table(token_bytes, STOP, [0]))


def test_the_strings_span_tokens_of_the_bpe(bpe: Bpe) -> None:
    """What the next test is about: `</` `calc` `>`, and the bytes of an accent that are one token."""
    assert [len(bpe.tokenizer.encode(s).ids) for s in STOP] == [3, 5, 3]
    assert b"</" in bpe.token_bytes and b"calc" in bpe.token_bytes


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(PIECES), max_size=8))
def test_with_the_tokens_of_a_bpe(bpe: Bpe, words: list[str]) -> None:
    """As a text is encoded, and as a policy may write it, cut elsewhere."""
    apart = [i for word in words for i in bpe.tokenizer.encode(word).ids]
    for ids in (bpe.tokenizer.encode("".join(words)).ids, apart):
        texts = [b"".join(bpe.token_bytes[i] for i in ids[: n + 1]) for n in range(len(ids))]
        assert not ids or texts[-1].decode() == "".join(words)
        want = next((n for n, text in enumerate(texts, 1) if any(s.encode() in text for s in STOP)), None)
        assert walk(bpe.table, ids) == want


def test_stopped_is_never_left() -> None:
    table = stop_table(BYTES, ("ab",), [EOS])
    assert (table[-1] == len(table) - 1).all() and table.dtype == np.int32
