import io

import numpy as np
import pytest
from rich.console import Console

from ppojax.runtime.progress import Progress, summary_table

METRICS = {
    "reward/mean": np.float32(0.25),
    "perf/throughput": 1234.5,
    "timing_s/gen": 3.21,
    "timing_s/update_actor": 7.0,
    "timing_s/step": 10.2,
}


class Clock:
    """A clock that moves when told."""

    now = 100.0

    def __call__(self):
        return self.now


def make_console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None, _environ={})


def test_without_a_terminal_each_step_is_one_plain_line():
    console, clock = make_console(terminal=False), Clock()
    with Progress(4, console, clock=clock) as progress:
        progress.phase("sampling")
        for step, seconds in ((1, 30), (2, 10), (4, 20)):
            clock.now += seconds
            progress.step(step, METRICS)
    assert console.file.getvalue().splitlines() == [
        "step 1/4  reward 0.250  1,234 tokens/s  eta 1:30  | update_actor 7.0s  gen 3.2s",
        "step 2/4  reward 0.250  1,234 tokens/s  eta 0:40  | update_actor 7.0s  gen 3.2s",
        "step 4/4  reward 0.250  1,234 tokens/s  | update_actor 7.0s  gen 3.2s",
    ]


def test_a_line_is_not_folded_at_the_width_of_the_console():
    console = Console(file=io.StringIO(), width=20, _environ={})
    with Progress(100, console) as progress:
        progress.step(1, METRICS)
        progress.note("x" * 100)
    assert len(console.file.getvalue().splitlines()) == 2


def test_a_step_without_metrics_is_shown():
    console = make_console(terminal=False)
    with Progress(1, console) as progress:
        progress.step(1, {})
    assert console.file.getvalue() == "step 1/1\n"


def test_a_terminal_gets_a_bar():
    console, clock = make_console(terminal=True), Clock()
    with Progress(4, console, start=1, clock=clock) as progress:
        progress.phase("sampling")
        clock.now += 3700
        progress.step(2, METRICS)
        progress.note("saved")
    out = console.file.getvalue()
    assert "2/4" in out and "reward 0.250" in out and "eta 2:03:20" in out and "\nsaved" in out.replace("\x1b[2K", "\n")


def test_plain_can_be_asked_for_on_a_terminal():
    console = make_console(terminal=True)
    with Progress(1, console, plain=True) as progress:
        progress.step(1, {"reward/mean": 1.0})
    assert console.file.getvalue() == "step 1/1  reward 1.000\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_note_is_not_obeyed(terminal):
    console = make_console(terminal)
    with Progress(1, console) as progress:
        progress.note("[red]a[/red] \x1b[31mb")
    assert r"[red]a[/red] \x1b[31mb" in console.file.getvalue()


def test_the_summary_sets_the_first_step_beside_the_last():
    first = {"step": 1, "reward/mean": 0.05, "actor/entropy": 1.5, "critic/vf_explained_var": None, "other": 1.0}
    last = {"step": 9, "reward/mean": 0.98765, "actor/entropy": 0.3}
    console = make_console(terminal=False)
    console.print(summary_table(first, last, {"wall-clock": "9 min", "[red]": 3}))
    lines = [line.strip("\u2502| ") for line in console.file.getvalue().splitlines()]
    cells = [tuple(cell.strip() for cell in line.replace("\u2502", "|").split("|")) for line in lines]
    assert ("reward/mean", "0.05", "0.9877") in cells
    assert ("actor/entropy", "1.5", "0.3") in cells
    assert ("critic/vf_explained_var", "-", "-") in cells
    assert ("wall-clock", "", "9 min") in cells and ("[red]", "", "3") in cells
    assert "other" not in console.file.getvalue()
