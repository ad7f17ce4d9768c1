"""A sweep as one table of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from ppojax.reporting.tables import number
from ppojax.sweeping.cells import Cell
from ppojax.sweeping.figures import SENT, Value, figures
from ppojax.sweeping.record import Record

GIB, MIB = 2.0**30, 2.0**20
CPU_NOTE = "These are host devices that share the cores of one CPU: their speeds are not a performance result."


HEADS = (
    *Cell._fields,
    "tokens/s/device",
    "step s",
    "MFU",
    "planned GiB",
    "measured GiB",
    "MiB sent, policy's update",
    "compile s, cold / cached",
    "first step",
)


def head(records: Sequence[Record]) -> str:
    """What the figures are of."""
    measured = [record.measured for record in records if record.measured is not None]
    planned = [record.planned for record in records if record.planned is not None]
    if planned:
        how = "compiled" if all(p.compiled for p in planned) else "estimated by formula"
        targets = ", ".join(sorted({f"{p.target} ({p.device})" for p in planned}))
        return f"Plans for {targets}, {how}; nothing was run."
    if not measured:
        return "No cell was measured."
    devices = ", ".join(sorted({m.device for m in measured}))
    note = f" {CPU_NOTE}" if any(m.platform == "cpu" for m in measured) else ""
    return f"Devices: {devices}.{note}"


def rows(records: Sequence[Record]) -> list[list[str]]:
    """The cells of the table, under `HEADS`; of a cell without figures the last one says why, and no more follow."""
    told = [figures(record, records) for record in records]
    return [[*(str(row[name]) for name in Cell._fields), *_cells(row)] for row in told]


def _cells(row: Mapping[str, Value]) -> list[str]:
    if row["state"] != "done":
        return [f"{row['state']}: {row['reason']}"]
    sent = {name.removeprefix(SENT): float(x) for name, x in row.items() if name.startswith(SENT) and x}
    cold, cached = (_number(row.get(f"compile_seconds_{how}"), form=".1f") for how in ("cold", "cached"))
    return [
        _number(row["tokens_per_second_per_device"], form=".1f"),
        _number(row["step_seconds"], form=".3g"),
        _number(row["mfu_actor"], form=".3f"),
        _planned(row),
        _measured(row),
        ", ".join(f"{axes} {size / MIB:.2f}" for axes, size in sent.items()) or "none",
        f"{cold} / {cached}",
        _first_step(row),
    ]


def _planned(row: Mapping[str, Value]) -> str:
    peak = _number(row["planned_peak_bytes"], GIB)
    return peak if row.get("fits", True) else f"{peak}: does not fit, limit {_number(row['limit_bytes'], GIB)}"


def _measured(row: Mapping[str, Value]) -> str:
    if row.get("measured_peak_bytes") is not None:
        return _number(row["measured_peak_bytes"], GIB)
    rss = row.get("host_peak_rss_bytes")
    return "-" if rss is None else f"host RSS {_number(rss, GIB)}"


def _first_step(row: Mapping[str, Value]) -> str:
    if "equality" not in row:
        return "-"
    difference = row["difference_from_reference"]
    told = _number(difference, form=".1e")  # nothing of one that is not finite
    return str(row["equality"]) + ("" if told == "-" else f" ({told})")


def _number(x: Value, unit: float = 1.0, form: str = ".3f") -> str:
    return "-" if x is None or isinstance(x, str) else number(x / unit, form)


def table(records: Sequence[Record]) -> Table:
    """Write the table for a terminal. Why cells have no figures is too long for it: see `reasons`."""
    out = Table(title=f"{len(records)} cells", caption=head(records))
    for name in HEADS:
        out.add_column(name, overflow="fold")
    for record, row in zip(records, rows(records), strict=True):
        out.add_row(*(row if record.state == "done" else [*record.cell, record.state]))
    return out


def reasons(records: Sequence[Record]) -> list[str]:
    """Say why cells have no figures."""
    return [f"{r.cell.name}: {r.state}: {r.reason}" for r in records if r.state != "done"]
