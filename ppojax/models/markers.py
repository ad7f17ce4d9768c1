"""Added tokens in text: where they stand, and how a content that spells one is broken up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken

# By these special tokens gpt-oss says to whom it speaks (harmony): who reads its text needs them.
CHANNELS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")


class Markers:
    """Added tokens, as a pattern over text."""

    def __init__(self, tokens: dict[int, AddedToken]) -> None:
        ordered = sorted(tokens.items(), key=lambda item: -len(item[1].content))
        self._ids = [i for i, _ in ordered]
        # One group a token; those that swallow spaces do so outside of it.
        forms = [
            (r"\s*" if t.lstrip else "") + f"({re.escape(t.content)})" + (r"\s*" if t.rstrip else "")
            for _, t in ordered
        ]
        self._pattern = re.compile("|".join(forms) or r"(?!)")

    def split(self, text: str) -> Iterator[str | int]:
        """Cut text at its markers; texts between them and ids of markers alternate."""
        at = 0
        for match in self._pattern.finditer(text):
            yield text[at : match.start()]
            assert match.lastindex is not None
            yield self._ids[match.lastindex - 1]
            at = match.end()
        yield text[at:]

    def break_up(self, text: str, mark: str) -> str:
        """Put a mark behind each character of each marker."""
        return self._pattern.sub(lambda m: "".join(c + mark for c in m.group()), text)


def strings_of(value: Any) -> Iterator[str]:
    """List every string inside nested lists and dicts (values only)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)
