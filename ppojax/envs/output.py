"""Long texts, cut to their start and their end."""

from __future__ import annotations


class Output:
    """Collects a text of any length in the space of `limit` characters."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._start = self._end = ""
        self._count = 0

    def add(self, text: str) -> None:
        """Append a piece."""
        self._count += len(text)
        room = self._limit - len(self._start)
        self._start += text[:room]
        self._end = (self._end + text[max(room, 0) :])[-self._limit :]

    def text(self) -> str:
        """Give the text, or, where it is over the limit, its start, how long it was, and its end.

        Lone surrogates become question marks: they could never be written.
        """
        if self._count > self._limit:
            note = f"\n[{self._count} characters, cut]\n"
            kept = max(self._limit - len(note), 0)
            start, end = kept - kept // 2, kept // 2
            whole = self._start + self._end
            text = self._start[:start] + note + whole[len(whole) - end :]
        else:
            text = self._start
        return text if text.isascii() else text.encode("utf-8", "replace").decode()


def shorten(text: str, limit: int) -> str:
    """Cut a text to `limit` characters, as `Output` does."""
    output = Output(limit)
    output.add(text)
    return output.text()
