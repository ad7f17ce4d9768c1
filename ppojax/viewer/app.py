"""The viewer on the terminal: steps and episodes on the left, the tokens of one episode on the right."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from ppojax.errors import DataError
from ppojax.viewer import filters
from ppojax.viewer.characters import one_line, visible
from ppojax.viewer.colours import QUANTITIES, Quantity, Scale, legend
from ppojax.viewer.episode import Episode, Token
from ppojax.viewer.page import facts, missing
from ppojax.viewer.run import StepEntry, StepFile, Summary, find_steps
from ppojax.viewer.widgets import Listing, TokenView, ValueLine

KEYS = (
    ("up down  k j", "previous, next episode"),
    ("p n", "previous, next step, also one that the run has done since"),
    ("g", "go to a step"),
    ("left right  h l", "previous, next token"),
    ("[ ]", "previous, next turn"),
    ("pageup pagedown  home end", "move through the tokens"),
    ("a v r m", "colour by advantage, value, ratio, mask"),
    ("/", "list some of the episodes: " + filters.HELP),
    ("escape", "leave a question; list all episodes again"),
    ("d", "dark or light"),
    ("? q", "these keys; leave"),
)
STEPS = f"{'step':>7} {'reward':>8}"
EPISODES = f"{'group':>5} {'episode':>7} {'reward':>7} {'ending':<6} {'turns':>5} {'rows':>4} {'tokens':>6}"
SHORT = {"terminated": "end", "truncated": "trunc", "cut": "cut", "error": "failed"}


class Help(ModalScreen[None]):
    """The keys. Any of them closes it."""

    CSS = "Help {align: center middle;} #keys {width: 76; max-width: 95%; height: auto; padding: 1 2; border: round;}"

    def compose(self) -> ComposeResult:
        """Lay out one line a key."""
        between = "\n" + " " * 26
        text = "\n".join(f"{keys:<26}{between.join(wrap(what, 44))}" for keys, what in KEYS)
        yield Static(Text(text), id="keys")

    def on_key(self, event: events.Key) -> None:
        """Close; the key means nothing else."""
        event.stop()
        self.dismiss()


class Viewer(App[None]):
    """Shows the transcripts of the run in a folder, from step `steps[at]` and its episode `number` on."""

    AUTO_FOCUS = None  # keys are the app's, but for the line that asks
    TITLE = "ppojax view"
    ENABLE_COMMAND_PALETTE = False
    HORIZONTAL_BREAKPOINTS: ClassVar[list[tuple[int, str]] | None] = [(0, "-narrow"), (100, "-wide")]
    CSS = """
    #lists {width: 50; border-right: solid $panel;}
    .-narrow #body {layout: vertical;}
    .-narrow #lists {width: 100%; height: 9; layout: horizontal; border-right: none; border-bottom: solid $panel;}
    #steps {height: 1fr; width: 1fr;} #episodes {height: 2fr; width: 1fr;}
    .-narrow #steps {height: 100%; width: 20;} .-narrow #episodes {height: 100%; width: 1fr;}
    #facts, #legend, #status {height: 1; text-wrap: nowrap; text-overflow: ellipsis;}
    #value {height: 1;}
    #token {height: 3;}
    #tokens {height: 1fr;}
    #question {display: none; height: 1; border: none; padding: 0;}
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(keys, f"episode({by})", show=False) for keys, by in (("up,k", -1), ("down,j", 1))),
        *(Binding(keys, f"step({by})", show=False) for keys, by in (("p", -1), ("n", 1))),
        *(Binding(keys, f"token({by})", show=False) for keys, by in (("left,h", -1), ("right,l", 1))),
        *(Binding(f"{side}_square_bracket", f"turn({by})", show=False) for side, by in (("left", -1), ("right", 1))),
        *(Binding(f"page{side}", f"page({by})", show=False) for side, by in (("up", -1), ("down", 1))),
        *(Binding(quantity[0], f"colour('{quantity}')", show=False) for quantity in QUANTITIES),
        Binding("home", "end(0)", show=False),
        Binding("end", "end(1)", show=False),
        Binding("g", "ask('step')", show=False),
        Binding("slash", "ask('filter')", show=False),
        Binding("escape", "escape", show=False),
        Binding("d", "dark", show=False),
        Binding("question_mark", "help", show=False),
        Binding("q", "quit", show=False),
    ]

    def __init__(self, run: str, steps: Sequence[StepEntry], at: int, number: int, quantity: Quantity) -> None:
        super().__init__()
        self.folder, self.steps, self.at, self.number = run, steps, at, number
        self.quantity: Quantity = quantity
        self.file: StepFile | None = None
        self.listed: list[Summary] = []
        self.chosen = 0
        self.wanted = ""  # the filter, as it was typed
        self.asked = ""  # what the question line is for

    def compose(self) -> ComposeResult:
        """Lay out the screen."""
        with Horizontal(id="body"):
            with Vertical(id="lists"):
                yield Listing(STEPS, id="steps")
                yield Listing(EPISODES, id="episodes")
            with Vertical():
                yield Static(id="facts")
                yield TokenView(id="tokens")
                yield ValueLine(id="value")
                yield Static(id="token")
                yield Static(id="legend")
        yield Input(id="question", compact=True)
        yield Static(id="status")

    def on_mount(self) -> None:
        """Show the first episode."""
        self._list_steps()
        self.query_one(TokenView).quantity = self.quantity
        self._open_step(self.at)
        if self.file is not None:
            self._open_episode(self.listed.index(self.file.find(self.number)))

    def _list_steps(self) -> None:
        lines = [f"{s.step:>7} {'-' if s.reward is None else format(s.reward, '8.3f'):>8}" for s in self.steps]
        self.query_one("#steps", Listing).fill(lines, self.at)

    def _open_step(self, at: int) -> None:
        self.at = at
        self.query_one("#steps", Listing).choose(at)
        try:
            self.file, fault = StepFile(self.steps[at]), ""
        except DataError as error:
            self.file, fault = None, one_line(str(error))
        self._list_episodes(fault)

    def _list_episodes(self, fault: str = "") -> None:
        passes = filters.parse_filter(self.wanted)
        known = () if self.file is None else self.file.episodes
        self.listed = [summary for summary in known if passes(summary)]
        self.query_one("#episodes", Listing).fill([_line(summary) for summary in self.listed], 0)
        some = (
            f"{len(self.listed)} of {len(known)} episodes: {one_line(self.wanted)}  (escape: all)"
            if self.wanted
            else ""
        )
        self._say(fault or some)
        self._open_episode(min(self.chosen, max(len(self.listed) - 1, 0)))

    def _open_episode(self, index: int) -> None:
        self.chosen = index
        self.query_one("#episodes", Listing).choose(index)
        episode: Episode | None = None
        if self.file is not None and self.listed:
            try:
                episode = self.file.episode(self.listed[index])
            except DataError as error:
                self._say(one_line(str(error)))
        scale = Scale() if self.file is None else self.file.scale
        self.query_one(TokenView).show(episode, scale)
        self.query_one("#facts", Static).update(
            Text("nothing to show" if episode is None else facts(episode), style="bold")
        )
        self._recolour()
        self._moved()

    def _recolour(self) -> None:
        view = self.query_one(TokenView)
        view.quantity = self.quantity
        view.refresh()
        said = "" if view.episode is None else missing(self.quantity, view.episode)
        text = Text(f"{self.quantity}: {said}")
        for at, name in () if said else legend(self.quantity, view.scale):
            text.append(f" {name} ", style=view.style_of(self.quantity, at))
        self.query_one("#legend", Static).update(text)

    def _moved(self) -> None:
        view = self.query_one(TokenView)
        episode, cursor = view.episode, view.cursor
        self.query_one(ValueLine).show(episode, cursor)
        text = Text()
        if episode is not None and episode.tokens:
            text = Text(numbers(episode.tokens[cursor], cursor, len(episode.tokens)))
        self.query_one("#token", Static).update(text)

    def _say(self, text: str) -> None:
        hint = "? keys   / filter   a v r m colours   q leave"
        self.query_one("#status", Static).update(Text(text or hint, style="" if text else "dim"))

    def action_episode(self, by: int) -> None:
        """Open the next or the previous episode of the list."""
        if 0 <= self.chosen + by < len(self.listed):
            self._open_episode(self.chosen + by)

    def action_step(self, by: int) -> None:
        """Open the next or the previous step. After the last one, look whether the run has gone on."""
        if self.at + by == len(self.steps):
            try:
                self.steps = find_steps(self.folder)
            except DataError as error:
                self._say(one_line(str(error)))
            self._list_steps()
        if 0 <= self.at + by < len(self.steps):
            self._open_step(self.at + by)

    def action_token(self, by: int) -> None:
        """Move the cursor by tokens."""
        view = self.query_one(TokenView)
        view.move(view.cursor + by)
        self._moved()

    def action_turn(self, by: int) -> None:
        """Move the cursor to the start of a turn of the policy."""
        view = self.query_one(TokenView)
        starts = [] if view.episode is None else [block.start for block in view.episode.blocks() if block.action]
        ahead = [start for start in starts if (start - view.cursor) * by > 0]
        if ahead:
            view.move(min(ahead) if by > 0 else max(ahead))
            self._moved()

    def action_page(self, by: int) -> None:
        """Move the cursor by a window."""
        self.query_one(TokenView).page(by)
        self._moved()

    def action_end(self, last: int) -> None:
        """Move the cursor to the first or the last token."""
        view = self.query_one(TokenView)
        view.move(last * (0 if view.episode is None else len(view.episode.tokens)))
        self._moved()

    def action_colour(self, quantity: Quantity) -> None:
        """Colour by something else."""
        self.quantity = quantity
        self._recolour()

    def action_dark(self) -> None:
        """Turn dark into light, and back."""
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"
        self._recolour()

    def action_help(self) -> None:
        """Show the keys."""
        self.push_screen(Help())

    def action_ask(self, what: str) -> None:
        """Open the line for a step or a filter."""
        self.asked = what
        line = self.query_one("#question", Input)
        line.value = self.wanted if what == "filter" else ""
        line.placeholder = filters.HELP if what == "filter" else "a step"
        line.styles.display = "block"
        line.focus()

    def action_escape(self) -> None:
        """Close the line, or list all episodes again."""
        if self.asked:
            self._close_question()
        elif self.wanted:
            self.wanted = ""
            self._list_episodes()

    def _close_question(self) -> None:
        self.asked = ""
        self.query_one("#question", Input).styles.display = "none"
        self.set_focus(None)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Do what was asked for, or say why not."""
        asked, text = self.asked, event.value.strip()
        self._close_question()
        if asked == "filter":
            try:
                filters.parse_filter(text)
            except ValueError as error:
                self._say(one_line(str(error)))
                return
            self.wanted = text
            self._list_episodes()
        elif text:
            known = [entry.step for entry in self.steps]
            if text.isdecimal() and int(text) in known:
                self._open_step(known.index(int(text)))
            else:
                self._say(f"no step {one_line(text)}; there are {len(known)}, {known[0]} to {known[-1]}")

    def on_listing_chosen(self, event: Listing.Chosen) -> None:
        """Open what was clicked."""
        (self._open_step if event.listing.id == "steps" else self._open_episode)(event.index)

    def on_token_view_moved(self, event: TokenView.Moved) -> None:
        """Move the cursor to what was clicked."""
        self.query_one(TokenView).move(event.index)
        self._moved()


def numbers(token: Token, index: int, count: int) -> str:
    """Say in two lines what is known of a token."""
    whose = f"turn {token.turn}" if token.action else "not the policy's"
    shown = visible(token.text, token.id).replace("\n", "")
    first = f"token {index + 1}/{count}  id {token.id}  '{shown}'  {whose}"
    known = {"logp": token.logp, "advantage": token.advantage, "ratio": token.ratio, "value": token.value}
    parts = [f"{name} {'none' if x is None else format(x, '.6g')}" for name, x in known.items() if token.action]
    if token.action and token.spread is not None:
        parts[-1] += f" +- {token.spread:.3g}"
    if token.reward:
        parts.append(f"reward {token.reward:.6g}")
    if token.held:
        parts.append("outside the trust region")
    return first + "\n" + "  ".join(parts)


def _line(summary: Summary) -> str:
    return (
        f"{summary.group:>5} {summary.number:>7} {summary.reward:>7.3g} {SHORT[summary.ending]:<6} {summary.turns:>5} "
        f"{len(summary.places):>4} {summary.tokens:>6}"
    )
