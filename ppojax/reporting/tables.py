"""The tables of a report: methods, pairs of them, and every run with how it ended."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ppojax.reporting.chart import classes, short, text
from ppojax.reporting.curves import final
from ppojax.reporting.methods import Method
from ppojax.reporting.runs import Run
from ppojax.statistics import MIN_RUNS, Estimate, estimate, probability_of_improvement

REWARD, SUCCESS = "reward/mean", "val/success"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; cells are markup."""
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<div class=wide><table><tr>{top}</tr>\n{body}</table></div>"


def key(name: str, slot: int) -> str:
    """Write a method's name beside a piece of its line."""
    line = f'<svg class="chart key" viewBox="0 0 28 8"><path class="s {classes(slot)}" d="M0 4H28"/></svg>'
    return f"<span class=key>{line} {text(name)}</span>"


def number(x: float | int | None, form: str = ".3f") -> str:
    """Write a number, or a dash where there is none."""
    return "-" if x is None or not math.isfinite(x) else format(x, form)


def interval(at: Estimate) -> str:
    """Write a number with its interval."""
    if at.low is None or at.high is None:
        return number(float(at.value))
    return f"{number(float(at.value))} [{number(float(at.low))}, {number(float(at.high))}]"


def scores(method: Method, metric: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The final number of each run that has one, and its stratum."""
    found = np.array([final(run, metric, rows) for run in method.runs])
    known = np.isfinite(found)
    return found[known], method.stratum_N[known]


def methods_table(methods: Sequence[Method], rows: int) -> str:
    """Final reward and success of each method."""
    lines = []
    for slot, method in enumerate(methods):
        reward, stratum = scores(method, REWARD, rows)
        known = [(run.last(SUCCESS), task) for run, task in zip(method.runs, method.tasks, strict=True)]
        success = np.array([x for x, _ in known if x is not None], np.float64)
        tasks = np.array([task for x, task in known if x is not None])
        ended = sum(run.done for run in method.runs)
        lines.append(
            (
                key(method.name, slot),
                f"{len(method.runs)}"
                + ("" if ended == len(method.runs) else f" ({len(method.runs) - ended} not done)"),
                interval(estimate(reward, stratum)) if len(reward) else "-",
                interval(estimate(success, tasks)) if len(success) else "-",
                short(float(np.mean([run.axis("tokens")[-1] for run in method.runs if run.steps] or [0]))),
                short(float(np.mean([run.seconds[-1] for run in method.runs if run.steps] or [0]))),
            )
        )
    head = ("method", "runs", f"final {REWARD}, IQM", f"{SUCCESS}, last, IQM", "tokens a run", "seconds a run")
    return table(head, lines)


def pairs_table(methods: Sequence[Method], rows: int) -> str:
    """How often a run of one method ends above a run of another."""
    lines = []
    for (i, a), (j, b) in combinations(enumerate(methods), 2):
        x, of_x = scores(a, REWARD, rows)
        y, of_y = scores(b, REWARD, rows)
        said = interval(probability_of_improvement(x, y, of_x, of_y)) if len(x) and len(y) else "-"
        lines.append((key(a.name, i), key(b.name, j), said))
    return table(("P(a run of this", "ends above a run of this)", "probability"), lines)


def runs_table(methods: Sequence[Method], rows: int) -> str:
    """Every run, and what there is to know of it."""
    lines = []
    for slot, method in enumerate(methods):
        seeds = Counter((run.seed, task) for run, task in zip(method.runs, method.tasks, strict=True))
        for run, task in zip(method.runs, method.tasks, strict=True):
            success = [run.last(name) for name in (SUCCESS, f"{SUCCESS}_low", f"{SUCCESS}_high")]
            said = "-" if success[0] is None else f"{number(success[0])} [{number(success[1])}, {number(success[2])}]"
            lines.append(
                (
                    f"<span class=key>{text(run.name)}</span>",
                    key(method.name, slot),
                    text(str(run.seed)),
                    str(run.steps),
                    number(final(run, REWARD, rows)),
                    said,
                    short(float(run.axis("tokens")[-1])) if run.steps else "-",
                    short(float(run.seconds[-1])) if run.steps else "-",
                    number(run.compiled, ".0f"),
                    ("" if run.done else "<strong>")
                    + text(_notes(run, seeds[run.seed, task]))
                    + ("" if run.done else "</strong>"),
                )
            )
    head = (
        "run",
        "method",
        "seed",
        "steps",
        f"final {REWARD}",
        f"{SUCCESS} [Wilson]",
        "tokens",
        "seconds",
        "compile s",
        "how it ended",
    )
    return table(head, lines)


def _notes(run: Run, same: int) -> str:
    again = [str(int(run.trained[i]["step"] or 0)) for i in np.flatnonzero(run.starts)[1:]]
    notes = [run.ending()]
    if again:
        notes.append(f"resumed at step {', '.join(again)}")
    if same > 1:
        notes.append("another run of this method has the same seed: they are not independent")
    return "; ".join(notes)


def few(methods: Sequence[Method]) -> str:
    """Say where there are too few runs for an interval."""
    names = [m.name for m in methods if min(Counter(m.tasks).values()) < MIN_RUNS]
    if not names:
        return ""
    return f"<p><strong>No interval, fewer than {MIN_RUNS} seeds:</strong> {text('; '.join(names))}.</p>"
