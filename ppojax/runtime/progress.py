"""The live display of a run, and the table at its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from ppojax.runtime.transcripts import escape_terminal

REWARD = "reward/mean"
THROUGHPUT = "perf/throughput"
TIMING = "timing_s/"
HEADLINE = (
    REWARD,
    "val/reward/mean",
    "response_length/mean",
    "num_turns/mean",
    "critic/vf_explained_var",
    "actor/entropy",
    "actor/grad_norm",
    "trust_region/masked_frac",
    "sampling/logp_diff_max",
)
RECENT_STEPS = 10


class Progress:
    """Show the progress of `total` steps: reward, tokens/s, the time left, and where the last step's time went.

    A terminal gets a live bar; anything else, or `plain`, one line a step. The time left is the mean of the last steps
    times those to go, by a clock that never goes back. `start` is the last step done by the run that this one resumes.
    """

    def __init__(
        self,
        total: int,
        console: Console | None = None,
        plain: bool | None = None,
        *,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.console = console if console is not None else Console()
        self.plain = not self.console.is_terminal if plain is None else plain
        self._clock = clock
        self._last = clock()
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._bar: Bar | None = None
        if not self.plain:
            bar = Bar(
                TextColumn("{task.fields[phase]}", markup=False, style="dim"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}", markup=False),
                console=self.console,
            )
            self._task = bar.add_task("", total=total, completed=start, phase="starting", line="")
            self._bar = bar

    def __enter__(self) -> Progress:
        self._last = self._clock()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, phase="stopped" if kind is not None else "done")
            self._bar.stop()

    def phase(self, text: str) -> None:
        """Say what the step is doing now (shown by the live bar only)."""
        if self._bar is not None:
            self._bar.update(self._task, phase=escape_terminal(text))

    def step(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Show that `step` is done."""
        now = self._clock()
        self._durations.append(now - self._last)
        self._last = now
        left = (self.total - step) * sum(self._durations) / len(self._durations)
        parts = [f"eta {_duration(left)}"] if step < self.total else []
        line = "  ".join([*_parts(metrics), *parts, *_split(metrics)])
        if self._bar is None:
            self._print(f"step {step}/{self.total}  {line}".rstrip())
        else:
            self._bar.update(self._task, completed=step, line=line)

    def note(self, text: str) -> None:
        """Print a line above the bar. Control characters and markup in it are shown, not obeyed."""
        self._print(escape_terminal(text))

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def summary_table(
    first: Mapping[str, float | int | None],
    last: Mapping[str, float | int | None],
    extra: Mapping[str, object],
    names: tuple[str, ...] = HEADLINE,
) -> Table:
    """Build the table printed at the end: the metrics `names` at the first and at the last step, then `extra`."""
    table = Table(show_header=True, header_style="bold")
    table.add_column("")
    table.add_column("first step", justify="right")
    table.add_column("last step", justify="right")
    for name in names:
        if name in first or name in last:
            table.add_row(name, _value(first.get(name)), _value(last.get(name)))
    for i, (name, value) in enumerate(extra.items()):
        if i == 0:
            table.add_section()
        table.add_row(Text(escape_terminal(name)), "", Text(escape_terminal(str(value))))
    return table


def _parts(metrics: Mapping[str, SupportsFloat]) -> list[str]:
    out = []
    if REWARD in metrics:
        out.append(f"reward {float(metrics[REWARD]):.3f}")
    if THROUGHPUT in metrics:
        out.append(f"{float(metrics[THROUGHPUT]):,.0f} tokens/s")
    return out


def _split(metrics: Mapping[str, SupportsFloat]) -> list[str]:
    """Name the parts of the step's time, the longest first, without their sum."""
    timing = {name.removeprefix(TIMING): float(value) for name, value in metrics.items() if name.startswith(TIMING)}
    timing.pop("step", None)
    ordered = sorted(timing.items(), key=lambda item: -item[1])
    return ["| " + "  ".join(f"{name} {value:.1f}s" for name, value in ordered)] if ordered else []


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _value(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}"
