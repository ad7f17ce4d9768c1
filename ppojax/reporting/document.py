"""The report: sections of charts and tables, put together as one page that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ppojax.reporting import chart
from ppojax.reporting.chart import PARTS, Series, bar_chart, line_chart, text
from ppojax.reporting.critics import Judged, join, judge
from ppojax.reporting.curves import make_curve
from ppojax.reporting.methods import Method
from ppojax.reporting.runs import Axis, Run
from ppojax.reporting.tables import (
    REWARD,
    SUCCESS,
    few,
    key,
    methods_table,
    number,
    pairs_table,
    runs_table,
    table,
)
from ppojax.statistics import DRAWS, estimate
from ppojax.viewer.page import figure, page
from ppojax.viewer.run import StepFile, find_steps

AXES: Mapping[Axis, str] = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training"}
TRUST = (
    *(f"trust_region/{name}" for name in ("masked_frac", "masked_frac_pos", "masked_frac_neg", "tv_mean", "tv_max")),
    *("trust_region/kl_mean", "actor/ppo_kl", "actor/pg_clipfrac", "actor/entropy"),
    *("sampling/logp_diff_mean", "sampling/logp_diff_max", "sampling/ratio_mean"),
)
CRITIC = ("critic/vf_explained_var", "critic/value_error/rms", "critic/value_std")
TOKENS = 4000  # of an episode that is shown
FIGURES = 12  # on a page

_STYLE = """
body{max-width:84rem}
h1{font-size:1.5rem}
h2{font-size:1.2rem;margin-top:2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;margin:.6rem 0}
th,td{text-align:left;padding:.2rem .9rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top}
td{font-variant-numeric:tabular-nums}
.key{overflow-wrap:anywhere}
svg.key{display:inline;width:28px;height:8px}
.soft{color:var(--soft);font-size:.9rem}
.swatch{display:inline-block;width:.8em;height:.8em}
.episode .text{padding-bottom:.5rem}
@media print{svg,tr{break-inside:avoid}body{max-width:none}}
"""


def document(methods: Sequence[Method], *, title: str, last: int, episodes: int) -> str:
    """Write the page.

    Args:
        methods: at least one.
        title: text.
        last: rows at the end of a run that its final reward is the mean of, and steps whose transcripts are read.
        episodes: transcripts of each method.

    Raises DataError when a transcript cannot be read.
    """
    runs = [run for method in methods for run in method.runs]
    parts = [
        f"<h1>{text(title)}</h1>",
        f"<p>{len(runs)} runs of {len(methods)} methods. {_ended(runs)}</p>",
        methods_table(methods, last),
        few(methods),
        _statistics(last),
        _pairs(methods, last),
        _learning(methods),
        "<h2>Runs</h2>",
        runs_table(methods, last),
        _trust(methods),
        _critic(methods, last),
        _time(methods),
        _transcripts(methods, episodes),
    ]
    return page(title, "\n".join(part for part in parts if part), style=style())


def _ended(runs: Sequence[Run]) -> str:
    late = [run.name for run in runs if not run.done]
    return f"<strong>{len(late)} did not come to their end: {text(', '.join(late))}.</strong>" if late else ""


def _statistics(last: int) -> str:
    return _soft(
        f"A run's final reward is the mean of its last {last} logged steps, wherever it ended; its success is that of "
        "its newest evaluation. IQM: the mean of the middle half of the runs (with fewer than four: of all). In "
        f"brackets 95% percentile intervals of {DRAWS} stratified bootstrap draws of the runs, after Agarwal et al. "
        "2021 (arXiv 2108.13264); with few seeds they are too narrow. A single run's interval of success is Wilson's."
    )


def _soft(words: str) -> str:
    return f"<p class=soft>{words}</p>"


def _pairs(methods: Sequence[Method], last: int) -> str:
    if len(methods) < 2:
        return ""
    return "<h2>Probability of improvement</h2>" + pairs_table(methods, last)


def _chart(methods: Sequence[Method], metric: str, axis: Axis = "step", title: str = "") -> str:
    series = []
    for slot, method in enumerate(methods):
        curve = make_curve(method, metric, axis)
        if curve is not None:
            series.append(Series(method.name, slot, curve.x, curve.y, curve.low, curve.high, curve.runs))
    return line_chart(series, title=title or metric, x_name=AXES[axis], within=metric == CRITIC[0])


def _charts(charts: Sequence[str]) -> str:
    drawn = [f"<div>{one}</div>" for one in charts if one]
    return f"<div class=charts>{''.join(drawn)}</div>"


def _legend(methods: Sequence[Method]) -> str:
    return "<p>" + " &emsp; ".join(key(method.name, slot) for slot, method in enumerate(methods)) + "</p>"


def _learning(methods: Sequence[Method]) -> str:
    if not any(run.has(REWARD) for method in methods for run in method.runs):
        return "<h2>Learning curves</h2><p>No run has done a step with a reward.</p>"
    drawn = [_chart(methods, REWARD, axis, f"{REWARD} against {name}") for axis, name in AXES.items()]
    drawn.append(_chart(methods, SUCCESS))
    return (
        "<h2>Learning curves</h2>"
        + _legend(methods)
        + _charts(drawn)
        + _soft(
            "Thick: the interquartile mean over runs, as far as all of them have come; bands: its interval at each "
            "place; thin: the runs, each to its end. Seconds are those of training steps (sampling, scoring, updates), "
            "without XLA's compilation where it was logged; the first step of a process, which compiles most, counts "
            "as the run's median step. Evaluation, warm start and checkpoints are not in them."
        )
    )


def _missing(methods: Sequence[Method], metrics: Sequence[str], what: str) -> str:
    without = [m.name for m in methods if not any(run.has(metric) for run in m.runs for metric in metrics)]
    return _soft(f"{what}: {text('; '.join(without))}.") if without else ""


def _trust(methods: Sequence[Method]) -> str:
    return (
        "<h2>Trust region, and the gap between sampler and trainer</h2>"
        + _missing(methods, [name for name in TRUST if name.startswith("trust_region/")], "No trust region was logged")
        + _legend(methods)
        + _charts([_chart(methods, metric) for metric in TRUST])
    )


def _critic(methods: Sequence[Method], steps: int) -> str:
    title = "<h2>Critic</h2>"
    missing = _missing(methods, CRITIC, "No critic, so no values")
    if not any(run.has(metric) for method in methods for run in method.runs for metric in CRITIC):
        return title + missing
    judged = [(slot, method, seen) for slot, method in enumerate(methods) if (seen := _judge(method, steps))]
    drawn = [_chart(methods, metric) for metric in CRITIC]
    by_part = [_by_part(slot, method, seen) for slot, method, seen in judged]
    whole = [(slot, method.name, join(list(seen.values()))) for slot, method, seen in judged]
    calibration = [Series(name, slot, *seen.calibration(), dots=True) for slot, name, seen in whole]
    spread = [
        Series(name, slot, *seen.disagreement(), dots=True) for slot, name, seen in whole if seen.spread is not None
    ]
    place = "explained variance by place in the row"
    drawn.append(line_chart(by_part, title=place, x_name="share of the row's actions", within=True))
    drawn.append(
        line_chart(calibration, title="value calibration", x_name="mean value", y_name="mean return", diagonal=True)
    )
    drawn.append(line_chart(spread, title="disagreement and error", x_name="deviation of critics", y_name="rms error"))
    read = "; ".join(f"{name}: {len(seen.values)} actions of {seen.steps} steps" for _, name, seen in whole)
    said = f"By place, calibration and disagreement are of the newest transcripts ({text(read)}). " if judged else ""
    alone = "" if spread else "No run had several critics, so none disagree. "
    return f"{title}{missing}{_legend(methods)}{_charts(drawn)}" + _soft(
        f"{said}{alone}Explained variance is 1 - Var[G - V] / Var[G], with G the Monte-Carlo return to the end of the "
        "episode and V the mean of the critics before the step's update; below -1 it is drawn as -1. Calibration: bins "
        "of about equal counts; on the line values are right."
    )


def _judge(method: Method, steps: int) -> dict[str, Judged]:
    return {run.name: seen for run in method.runs if (seen := judge(run, steps)) is not None}


def _by_part(slot: int, method: Method, seen: Mapping[str, Judged]) -> Series:
    """Over the runs; where the returns of one do not vary, over the others."""
    stratum_N = np.array([task for run, task in zip(method.runs, method.tasks, strict=True) if run.name in seen])
    parts = np.array([one.by_part() for one in seen.values()])
    x = (np.arange(parts.shape[1]) + 0.5) / parts.shape[1]
    known = np.isfinite(parts)
    at = [estimate(column[on], stratum_N[on]) for column, on in zip(parts.T, known.T, strict=True) if on.any()]
    value = np.array([one.value for one in at])
    low, high = ([edge for edge in edges if edge is not None] for edges in ([e.low for e in at], [e.high for e in at]))
    band = (np.array(low), np.array(high)) if len(low) == len(at) else (None, None)
    return Series(method.name, slot, x[known.any(0)], value, *band, dots=True)


def _time(methods: Sequence[Method]) -> str:
    known = [(method, split) for method in methods if (split := time_split(method.runs)) is not None]
    title = "<h2>Where a step's time goes</h2>"
    if not known:
        return title + _soft("No run has logged the time of its steps.")
    rows = [(text(method.name), *(number(x, ".3g") for x in (*split, sum(split)))) for method, split in known]
    return (
        f"{title}{bar_chart([(method.name, split) for method, split in known])}{parts_legend()}"
        + table(("seconds a step", *PARTS, "step"), rows)
        + _soft(
            "Means over the steps of all runs but the first of each process, which compiles; gen is without the wait "
            "for environments, rest is what no part accounts for."
        )
    )


def time_split(runs: Sequence[Run]) -> list[float] | None:
    """Mean seconds of each of `PARTS`, over the steps that are not the first of their process, or all if all are."""
    found = []
    for run in runs:
        if not run.has("timing_s/step"):
            continue
        kept = np.ones(len(run.starts), bool) if run.starts.all() else ~run.starts
        columns = {name: np.nan_to_num(run.column(f"timing_s/{name}")) for name in (*PARTS[:-1], "step")}
        columns["gen"] = np.maximum(columns["gen"] - columns["env_wait"], 0)
        parts = [columns[name][kept] for name in PARTS[:-1]]
        found.append(np.stack([*parts, np.maximum(columns["step"][kept] - sum(parts), 0)]))
    return np.concatenate(found, axis=1).mean(1).tolist() if found else None


def _transcripts(methods: Sequence[Method], episodes: int) -> str:
    out = [
        "<h2>Transcripts</h2>"
        + _soft(
            "Of the newest step of each method's first run: from the episode with the least reward to the one with the "
            "most. Colours are advantages, unless another is chosen."
        )
    ]
    drawn = 0
    for method in methods:
        run = next((run for run in method.runs if any(run.folder.rollouts.glob("step_*.jsonl"))), None)
        if run is None or not episodes:
            out.append(f"<p>No transcript of {text(method.name)}.</p>" if episodes else "")
            continue
        file = StepFile(find_steps(run.name)[-1])
        ranked = sorted(file.episodes, key=lambda summary: (summary.reward, summary.number))
        places = np.unique(np.linspace(0, len(ranked) - 1, episodes).round().astype(int)) if episodes > 1 else [-1]
        for place in places:
            summary = ranked[place]
            where = f"{method.name}: {run.name}, step {file.step}, episode {summary.number}"
            if summary.tokens > TOKENS or drawn >= FIGURES:
                see = f"python -m ppojax.view run={run.name} step={file.step} episode={summary.number}"
                out.append(f"<p>{text(where)}: {summary.tokens} tokens, left out here; <code>{text(see)}</code></p>")
                continue
            out.append(figure(file.episode(summary), file.scale, title=where, name=f"e{drawn}"))
            drawn += 1
    return "\n".join(filter(None, out)) if episodes else ""


def parts_legend() -> str:
    """Name the colours of `bar_chart`."""
    swatches = (f'<span class="swatch w{i}"></span> {part}' for i, part in enumerate(PARTS))
    return f"<p>{' &emsp; '.join(swatches)}</p>"


def style() -> str:
    """Write the rules of a page with charts and tables."""
    swatches = "\n".join(f".swatch.w{i}{{background:{colour}}}" for i, colour in enumerate(chart.PART_COLOURS))
    return chart.style() + _STYLE + swatches
