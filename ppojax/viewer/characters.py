"""A token's text as it may be shown: every character visible, none that steers a terminal or a page."""

from __future__ import annotations

import unicodedata

NEWLINE = "\u21b5\n"  # an arrow, and the line does end


def visible(text: str, token: int) -> str:
    """Write the text of a token so that all of it is seen.

    Control, format, private and unassigned characters, separators and lone surrogates are spelled out (`\\x1b`), which
    covers escape sequences and bidirectional overrides. A mark that would combine with the token before stands on a
    dotted circle. A token without text is its number, in angle quotes. Markup is left for the caller to escape.
    """
    if not text:
        return f"\u2039{token}\u203a"
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(map(_visible, text))
    return f"\u25cc{shown}" if unicodedata.category(text[0]) in ("Mn", "Me", "Mc") else shown


def one_line(text: str) -> str:
    """The same for a text that has to stay on a line."""
    return "".join(c if c.isprintable() else _spelled(c) for c in text)


def _visible(character: str) -> str:
    if character == "\n":
        return NEWLINE
    return character if character.isprintable() else _spelled(character)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
