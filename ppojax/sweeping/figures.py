"""What is told of each cell, as numbers: the same ones in the table, on the page and in the CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ppojax.sweeping.record import Measured, Planned, Record

LOSSES = ("actor/loss", "critic/loss", "actor/grad_norm", "critic/grad_norm")
# Largest difference from the reference mesh in the first step, of a number's size and at least of SMALL.
BOUNDS: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
SMALL = 1e-2
SENT = "sent_bytes_actor_update_"  # before the axes along which
Value = float | int | str | None


class Equal(NamedTuple):
    """How the first step of a cell compares with that of the reference mesh."""

    difference: float | None  # the largest, relative (see `BOUNDS`); None where there is nothing to compare
    rows: int  # that were drawn differently
    of: int
    bound: float
    reference: bool = False  # it is that cell itself

    @property
    def words(self) -> str:
        """In short."""
        if self.difference is None:
            return "reference" if self.reference else "-"
        if self.rows:
            return f"{self.rows} of {self.of} rows drawn differently"
        if math.isinf(self.difference):
            return "DIFFERENT: only one is finite"
        return "equal" if self.difference <= self.bound else "DIFFERENT"


def compare(record: Record, reference: Record | None) -> Equal:
    """Compare losses and gradient norms of the first step, before whose updates all cells have the same weights.

    A number that only one of them has (the other's is not finite) differs without bound.
    """
    mine, theirs = record.measured, None if reference is None else reference.measured
    bound = BOUNDS[record.dtype or "float32"]
    if mine is None or theirs is None or record is reference:
        return Equal(None, 0, 0, bound, mine is not None and record is reference)
    pairs = [(mine.steps[0].get(name), theirs.steps[0].get(name)) for name in LOSSES]
    drawn = sum(a != b for a, b in zip(mine.rows, theirs.rows, strict=False)) + abs(len(mine.rows) - len(theirs.rows))
    worst = max((_difference(a, b) for a, b in pairs if (a, b) != (None, None)), default=None)
    return Equal(worst, drawn, len(theirs.rows), bound)


def _difference(a: float | None, b: float | None) -> float:
    return math.inf if a is None or b is None else abs(a - b) / max(abs(b), SMALL)


def reference_of(record: Record, records: Sequence[Record]) -> Record | None:
    """The first cell that was measured with the same critic: micro-batches and meshes are to change nothing."""
    done = (r for r in records if r.measured is not None and r.cell.critic == record.cell.critic)
    return next(done, None)


def settled(measured: Measured, name: str) -> float | None:
    """The median of a metric over the steps but the first, which compiles; of one step, where there is no other."""
    rows = measured.steps[1:] or measured.steps
    known = [x for row in rows if (x := row.get(name)) is not None]
    return statistics.median(known) if known else None


def figures(record: Record, records: Sequence[Record]) -> dict[str, Value]:
    """All that is told of a cell; None for what is not known, nothing for what does not belong to it."""
    out: dict[str, Value] = {**record.cell._asdict(), "state": record.state, "reason": record.reason}
    if record.measured is not None:
        out |= _of_measured(record, record.measured, records)
    if record.planned is not None:
        out |= _of_planned(record.planned)
    return out


def _of_planned(planned: Planned) -> dict[str, Value]:
    told = planned.model_dump(exclude={"sent", "mfu", "peak_bytes", "compile_seconds"})
    told |= {
        "mfu_step": planned.mfu,
        "planned_peak_bytes": planned.peak_bytes,
        "compile_seconds_cold": planned.compile_seconds if planned.compiled else None,
    }
    return told | {f"{SENT}{axes}": size for axes, size in sorted(planned.sent.items())}


def _of_measured(record: Record, measured: Measured, records: Sequence[Record]) -> dict[str, Value]:
    equal, again = compare(record, reference_of(record, records)), record.again
    if again is not None and not again.cached:  # jax was told to keep nothing
        again = None
    sent = measured.sent("actor_step")
    return {
        "platform": measured.platform,
        "device": measured.device,
        "devices": measured.devices,
        "steps": len(measured.steps),
        "tokens_per_second_per_device": settled(measured, "perf/throughput"),
        "step_seconds": settled(measured, "timing_s/step"),
        "actor_update_tflops_per_device": settled(measured, "perf/actor_tflops"),
        "mfu_actor": settled(measured, "perf/mfu"),
        "planned_peak_bytes": measured.planned_bytes,
        "measured_peak_bytes": measured.peak_bytes,
        "host_peak_rss_bytes": measured.peak_rss_bytes,
        "programs": measured.start.compiled,
        "compile_seconds_cold": measured.steps[0].get("compile/seconds"),  # as the start with all compiled has one step
        "compile_seconds_cached": None if again is None else again.compile_seconds,
        "start_seconds_cold": measured.start.seconds,
        "start_seconds_cached": None if again is None else again.seconds,
        **{f"first_step_{name}": measured.steps[0].get(name) for name in LOSSES},
        "difference_from_reference": equal.difference,
        "bound": equal.bound,
        "rows_drawn_differently": equal.rows if equal.of else None,
        "equality": equal.words,
        **{f"{SENT}{axes}": record.updates * size for axes, size in sorted(sent.items())},
    }


def to_csv(records: Sequence[Record]) -> str:
    """All figures of all cells."""
    rows = [figures(record, records) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
