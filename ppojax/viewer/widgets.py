"""The parts of the viewer's screen. Only what is visible is drawn, and text is never read as markup."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.color import Color
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from ppojax.viewer.characters import visible
from ppojax.viewer.colours import Quantity, Scale, colour, level
from ppojax.viewer.curve import sparkline
from ppojax.viewer.episode import Episode
from ppojax.viewer.page import cut, heading

_NAME, _RANGE = 10, 24  # room beside a curve: equal, so that one token is at one place in all
_RULE = -1  # in place of a token: a line of ours
Line = list[tuple[int, str]]  # tokens and what is shown of them


class Listing(ScrollView, can_focus=False):
    """Lines of a table, one of them chosen."""

    class Chosen(Message):
        """A line was clicked."""

        def __init__(self, listing: Listing, index: int) -> None:
            super().__init__()
            self.listing, self.index = listing, index

        @property
        def control(self) -> Listing:
            """The list, for handlers that are for one list only."""
            return self.listing

    def __init__(self, header: str, *, id: str) -> None:
        super().__init__(id=id)
        self._header = header
        self._lines: Sequence[str] = ()
        self.chosen = 0

    def fill(self, lines: Sequence[str], chosen: int) -> None:
        """Show these lines; they hold printable characters only."""
        self._lines = lines
        width = max(map(len, (self._header, *lines)))
        self.virtual_size = Size(width, len(lines) + 1)
        self.choose(chosen)

    def choose(self, index: int) -> None:
        """Mark a line, and scroll to it."""
        self.chosen = index
        # The header keeps the first line of the screen.
        self.scroll_to_region(Region(0, index, 1, 2), animate=False, force=True)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw a line of the screen: the header on top, whatever is scrolled to beneath."""
        index = y + self.scroll_offset.y - 1
        if y == 0:
            text, style = self._header, self.rich_style + Style(dim=True)
        else:
            text = self._lines[index] if index < len(self._lines) else ""
            style = self.rich_style + Style(reverse=index == self.chosen and bool(text))
        return Strip([Segment(text, style)]).adjust_cell_length(self.size.width, self.rich_style)

    def on_click(self, event: events.Click) -> None:
        """Choose what was clicked."""
        index = event.y + self.scroll_offset.y - 1
        if event.y and index < len(self._lines):
            self.post_message(self.Chosen(self, index))


class TokenView(ScrollView, can_focus=False):
    """The tokens of an episode, coloured, with a cursor."""

    class Moved(Message):
        """A token was clicked."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.episode: Episode | None = None
        self.scale = Scale()
        self.quantity: Quantity = "advantage"
        self.cursor = 0
        self._lines: list[Line] = []
        self._line_of: list[int] = []

    def show(self, episode: Episode | None, scale: Scale) -> None:
        """Show another episode, from its start; None for none."""
        self.episode, self.scale = episode, scale
        self._break_lines()
        self.scroll_to(0, 0, animate=False, force=True, immediate=True)
        self.move(0)

    def move(self, cursor: int) -> None:
        """Put the cursor on a token, and scroll to it."""
        count = len(self._line_of)
        self.cursor = min(max(cursor, 0), max(count - 1, 0))
        if count:
            region = Region(0, max(self._line_of[self.cursor] - 1, 0), 1, 3)
            self.scroll_to_region(region, animate=False, force=True, immediate=True)
        self.refresh()

    def page(self, direction: int) -> None:
        """Move the cursor by the height of the window."""
        if self._line_of:
            self.to_line(self._line_of[self.cursor] + direction * max(self.size.height - 2, 1))

    def to_line(self, line: int) -> None:
        """Move the cursor to the token nearest to the start of a line."""
        if self._line_of:
            line = min(max(line, 0), len(self._lines) - 1)
            self.move(min(range(len(self._line_of)), key=lambda i: abs(self._line_of[i] - line)))

    def on_resize(self) -> None:
        """Break the lines anew."""
        self._break_lines()
        self.move(self.cursor)

    def _break_lines(self) -> None:
        width = max(self.scrollable_content_region.width, 8)
        self._lines, self._line_of = ([], []) if self.episode is None else arrange(self.episode, width)
        self.virtual_size = Size(width, len(self._lines))

    def render_line(self, y: int) -> Strip:
        """Draw a line of the screen."""
        index, width = y + self.scroll_offset.y, self.size.width
        segments = []
        for token, text in self._lines[index] if index < len(self._lines) else ():
            segments.append(Segment(text, self.rich_style + self._style(token)))
        return Strip(segments).adjust_cell_length(width, self.rich_style)

    def _style(self, index: int) -> Style:
        if index == _RULE or self.episode is None:
            return Style(dim=True)
        token = self.episode.tokens[index]
        if index == self.cursor:
            return Style(reverse=True, bold=True)
        at = level(self.quantity, token, self.scale)
        return self.style_of(self.quantity, at) + Style(dim=not token.action)

    def style_of(self, quantity: Quantity, at: int) -> Style:
        """Give the colours of a level over this widget's background."""
        if at == 0:
            return Style()
        rgb, alpha = colour(quantity, at)
        return Style(bgcolor=self.background_colors[1].blend(Color(*rgb), alpha).rich_color)

    def on_click(self, event: events.Click) -> None:
        """Put the cursor on the token that was clicked."""
        line, x = event.y + self.scroll_offset.y, event.x
        for token, text in self._lines[line] if line < len(self._lines) else ():
            x -= cell_len(text)
            if x < 0:
                if token != _RULE:
                    self.post_message(self.Moved(token))
                return


def arrange(episode: Episode, width: int) -> tuple[list[Line], list[int]]:
    """Break an episode into lines of up to `width` cells, and tell the line in which each token begins.

    A token that fits into a line is not torn. A line of ours stands before each turn and each row.
    """
    lines: list[Line] = []
    line_of: list[int] = []
    for block in episode.blocks():
        if block.first and block.segment:
            lines.append([(_RULE, _rule(cut(block.segment, episode), width, "\u2550"))])
        lines += [[(_RULE, _rule(heading(block), width, "\u2500"))], []]
        room = width
        for i in range(block.start, block.end):
            token = episode.tokens[i]
            parts = visible(token.text, token.id).split("\n")
            if room < min(cell_len(parts[0]), width):
                lines.append([])
                room = width
            line_of.append(len(lines) - 1)
            for k, part in enumerate(parts):
                if k:
                    lines.append([])
                    room = width
                room = _put(lines, i, part, room, width)
    return lines, line_of


def _put(lines: list[Line], token: int, text: str, room: int, width: int) -> int:
    """Append text to the last line, and to new ones when it is full; tell the room that is left."""
    cells = cell_len(text)
    if cells <= room:
        if text:
            lines[-1].append((token, text))
        return room - cells
    start = 0
    for end, character in enumerate(text):
        cells = cell_len(character)
        if cells > room:
            lines[-1].append((token, text[start:end]))
            lines.append([])
            start, room = end, width
        room -= cells
    if text[start:]:
        lines[-1].append((token, text[start:]))
    return room


def _rule(text: str, width: int, line: str) -> str:
    return f"{line * 2} {text} ".ljust(width, line)[:width]


class ValueLine(Widget):
    """The critic's value over the tokens, and the critics' deviation where there are several."""

    episode: Episode | None = None
    cursor = 0

    def show(self, episode: Episode | None, cursor: int) -> None:
        """Show an episode and where the cursor is."""
        self.episode, self.cursor = episode, cursor
        self.styles.height = 2 if episode is not None and episode.critics > 1 else 1
        self.refresh()

    def render(self) -> Text:
        """Draw block characters, and the range that they span."""
        if self.episode is None:
            return Text()
        tokens = self.episode.tokens
        curves = [("value", [token.value for token in tokens])]
        if self.episode.critics > 1:
            curves.append(("deviation", [token.spread for token in tokens]))
        return Text("\n").join(self._curve(name, numbers) for name, numbers in curves)

    def _curve(self, name: str, numbers: Sequence[float | None]) -> Text:
        known = [x for x in numbers if x is not None]
        if not known:
            return Text("no values: the run has no critic", style="dim")
        low, high = min(known), max(known)
        drawn = sparkline(numbers, max(self.size.width - _NAME - _RANGE, 1), low, high)
        text = Text(f"{name:<{_NAME}}{drawn} {low:.3g} .. {high:.3g}")
        at = _NAME + self.cursor * len(drawn) // len(numbers)
        text.stylize("reverse", at, at + 1)
        return text
