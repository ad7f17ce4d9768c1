import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ppojax.runtime.transcripts import escape_terminal, pieces, read_transcripts, render_transcript, write_transcripts
from ppojax.types import Ending, Row


def make_row(text, action_from=2, **kwargs):
    n = len(text)
    action = np.arange(n) >= action_from
    reward = np.zeros(n, np.float32)
    reward[-1] = 1
    fields = {
        "token": np.array([ord(c) for c in text], np.int32),
        "action": action,
        "logp_behavior": np.where(action, np.float32(-0.123456789), np.float32(0)),
        "reward": reward,
        "group": 1,
        "episode": 2,
        "segment": 0,
        "ending": Ending.TERMINATED,
        "messages": [{"role": "user", "content": text[:action_from]}],
    }
    return Row(**{**fields, **kwargs})


def decode(ids):
    return "".join(map(chr, ids))


def show(row):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    console.print(render_transcript(row))
    return console.file.getvalue()


def test_a_row_holds_what_was_sampled_and_what_was_computed(tmp_path):
    rows = [make_row("2+3=5"), make_row("hi!", ending=Ending.ERROR)]
    advantage_BT = np.arange(16, dtype=np.float32).reshape(2, 8)
    write_transcripts(
        tmp_path / "rollouts" / "step_000001.jsonl",
        rows,
        decode,
        advantage_BT=advantage_BT,
        value_MBT=np.stack([advantage_BT / 2, advantage_BT / 4]),
        ratio_BT=np.full((2, 8), np.inf, np.float32),
    )
    first, second = read_transcripts(tmp_path / "rollouts" / "step_000001.jsonl")
    assert first["text"] == list("2+3=5") and first["token"] == [ord(c) for c in "2+3=5"]
    assert first["action"] == [0, 0, 1, 1, 1] and first["reward"] == [0, 0, 0, 0, 1] and first["reward_sum"] == 1
    assert first["logp_behavior"] == [0, 0, -0.123457, -0.123457, -0.123457]
    assert first["advantage"] == [0, 1, 2, 3, 4]
    assert first["value"] == [[0, 0.5, 1, 1.5, 2], [0, 0.25, 0.5, 0.75, 1]]
    assert first["ratio"] == [None] * 5
    assert first["messages"] == [{"role": "user", "content": "2+"}]
    assert (first["group"], first["episode"], first["segment"], first["ending"]) == (1, 2, 0, "terminated")
    assert second["ending"] == "error" and second["advantage"] == [8, 9, 10]


def test_what_was_not_computed_is_null(tmp_path):
    write_transcripts(tmp_path / "t.jsonl", [make_row("abc")], decode)
    (row,) = read_transcripts(tmp_path / "t.jsonl")
    assert row["advantage"] is row["value"] is row["ratio"] is None
    assert "abc" in show(row).replace("\x1b[2m", "").replace("\x1b[0m", "")


def test_the_file_itself_is_harmless_in_a_terminal(tmp_path):
    write_transcripts(tmp_path / "t.jsonl", [make_row("a\x1b[2J\x9b31m\u202e\x7f")], decode)
    data = (tmp_path / "t.jsonl").read_bytes()
    assert b"\x1b" not in data and max(data) < 0x80
    assert json.loads(data)["text"] == list("a\x1b[2J\x9b31m\u202e\x7f")


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "rollouts").write_text("a file")
    write_transcripts(tmp_path / "rollouts" / "t.jsonl", [make_row("abc")], decode)
    assert "t.jsonl: the transcripts were not written" in caplog.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("over\rwritten", r"over\rwritten"),
        ("back\x08\x08\x7f", r"back\x08\x08\x7f"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("a\u2028b\ud800", r"a\u2028b\ud800"),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert escape_terminal(text) == shown


def test_common_text_is_left_alone():
    text = "line\n\ttabbed, gr\u00fc\u00dfe, \u4f60\u597d, \U0001f600 [red] \\x1b"
    assert escape_terminal(text) == text


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_nothing_unsafe_is_left(text):
    assert all(c in "\n\t" or (c.isprintable() or ord(c) >= 0xA0) for c in escape_terminal(text))
    assert "\x1b" not in escape_terminal(text)


def test_markup_and_escapes_of_the_model_are_shown_not_obeyed(tmp_path):
    text = "[red]x[/red] [link=http://a]y[/link] [/] \x1b[31mz"
    write_transcripts(tmp_path / "t.jsonl", [make_row(text, action_from=0)], decode)
    (row,) = read_transcripts(tmp_path / "t.jsonl")
    assert r"[red]x[/red] [link=http://a]y[/link] [/] \x1b[31mz" in render_transcript(row).plain
    assert "\x1b[31m" not in show(row) and "\x1b]8" not in show(row)


def test_colours_say_whose_token_it_is_and_how_it_was_judged(tmp_path):
    advantage_BT = np.array([[0, 0.5, -0.5, 0]], np.float32)
    write_transcripts(tmp_path / "t.jsonl", [make_row("pgbw", action_from=1)], decode, advantage_BT=advantage_BT)
    (row,) = read_transcripts(tmp_path / "t.jsonl")
    assert "\x1b[2mp\x1b[0m\x1b[32mg\x1b[0m\x1b[31mb\x1b[0mw" in show(row)
    assert "episode 2  terminated  reward 1.00" in show(row)


def byte_decode(ids):
    return bytes(ids).decode(errors="replace")


@given(st.text(max_size=30))
def test_pieces_join_to_the_text_when_a_character_is_spread_over_tokens(text):
    ids = list(text.encode())
    out = pieces(ids, byte_decode)
    assert len(out) == len(ids) and "".join(out) == text


def test_a_character_is_the_piece_of_its_last_token():
    assert pieces(list("a\u00e9b".encode()), byte_decode) == ["a", "", "\u00e9", "b"]


def test_a_text_that_stops_within_a_character_is_kept():
    assert pieces(list("a\u00e9".encode())[:2], byte_decode) == ["a", "\ufffd"]


def test_a_decoder_that_strips_the_first_space_does_not_strip_every_piece():
    words = {0: " a", 1: " b", 2: " c"}

    def strip_decode(ids):
        return "".join(words[i] for i in ids).removeprefix(" ")

    assert pieces([0, 1, 2], strip_decode) == ["a", " b", " c"]


def test_how_a_row_ended(tmp_path):
    """The value of what follows is kept where something does; the kind of failure where it failed."""
    rows = [
        make_row("abc", ending=Ending.CUT, clipped=True),
        make_row("abcd", ending=Ending.TRUNCATED),  # the arrays end where it does
        make_row("abc", info={"error": "said by the environment"}),
        make_row("ab", ending=Ending.ERROR, info={"error": "TimeoutError"}),
    ]
    value_MBT = np.arange(32, dtype=np.float32).reshape(2, 4, 4) / 3
    write_transcripts(tmp_path / "t.jsonl", rows, decode, value_MBT=value_MBT)
    found = read_transcripts(tmp_path / "t.jsonl")
    assert [row["value_end"] for row in found] == [[1, 6.33333], None, None, None]
    assert [row["error"] for row in found] == [None, None, None, "TimeoutError"]
    assert [row["clipped"] for row in found] == [True, False, False, False]
