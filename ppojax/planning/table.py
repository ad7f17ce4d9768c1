"""A plan as tables, and as JSON."""

from __future__ import annotations

from typing import Any

import jax
from rich.table import Table

from ppojax.mesh import AXES, MeshConfig
from ppojax.planning.advice import Change
from ppojax.planning.costs import sending
from ppojax.planning.memory import Terms, mesh_of
from ppojax.planning.models import weights_of
from ppojax.planning.planner import Report
from ppojax.planning.program import Program

GIB = 2.0**30


def mesh_text(mesh: MeshConfig) -> str:
    """`fsdp 4 x tensor 2`: the axes that have several devices."""
    return " x ".join(f"{axis} {n}" for axis, n in zip(AXES, mesh.shape, strict=True) if n > 1) or "one device"


def head_line(report: Report) -> str:
    """What was planned for what, and how."""
    sizes = [f"policy {weights_of(report.models.actor).all / 1e9:.2f}B"]
    if report.models.critic is not None:
        sizes.append(f"critic {weights_of(report.models.critic).all / 1e9:.2f}B")
    how = "compiled for it" if report.compiled else "ESTIMATE by formula, nothing compiled"
    return f"{', '.join(sizes)} on {report.target} ({mesh_text(report.config.mesh)}): {how}"


def memory_table(report: Report) -> Table:
    """Memory of each device, by part of a step and by term."""
    name, peak = report.peak
    verdict = "fits" if report.fits else "DOES NOT FIT"
    title = f"{verdict}: {peak.total / GIB:.1f} of {report.limit / GIB:.1f} GiB a device, while {name} runs"
    table = Table(title=title)
    table.add_column("GiB a device")
    for part in report.memory:
        table.add_column(part, justify="right")
    for term in Terms._fields:
        held = [terms._asdict()[term] / GIB for terms in report.memory.values()]
        table.add_row(term, *(f"{x:.2f}" if x else "-" for x in held))
    totals = [terms.total for terms in report.memory.values()]
    table.add_section()
    table.add_row("in all", *(f"{x / GIB:.2f}" for x in totals))
    table.add_row("of the limit", *(f"{x / report.limit:.0%}" for x in totals))
    return table


def time_table(report: Report, price: float | None) -> Table:
    """Expected time of a step, and what that comes to."""
    speed = report.speed
    title = (
        f"a step of {report.work.rows} rows x {report.work.tokens} tokens: {speed.step_s:.1f} s, "
        f"{speed.tokens_per_device:.0f} tokens/s a device, MFU {speed.mfu:.1%} (policy's update {speed.mfu_actor:.1%})"
    )
    if price is not None:
        cost = report.cost(price)
        title += f"\nat ${price:g} a device and hour: ${cost:.3f} a step, ${cost * report.config.steps:.0f} for "
        title += f"{report.config.steps} steps"
    table = Table(title=title)
    for column in ("expected", "seconds", "of it sending", "TFLOP by formula"):
        table.add_column(column, justify="left" if column == "expected" else "right")
    for name, part in speed.parts.items():
        sent = sending(part.work.sent, report.target, mesh_of(report.config, name))
        table.add_row(name, f"{part.seconds:.2f}", f"{sent:.2f}", f"{part.flops / 1e12:.1f}")
    return table


def program_table(report: Report) -> Table:
    """What the compiled programs say of themselves."""
    table = Table(title="compiled programs: one call on one device")
    for column in ("program", "compiled in", "arguments", "temporary", "sent, by axes of the mesh"):
        table.add_column(column, justify="left" if column in ("program", "sent, by axes of the mesh") else "right")
    for program in report.programs:
        sent = _sent(program)
        arguments, temporary = (x / GIB for x in (program.memory.arguments, program.memory.temporary))
        cells = (f"{program.seconds:.1f} s", f"{arguments:.2f} GiB", f"{temporary:.2f} GiB")
        table.add_row(program.name, *cells, "\n".join(sent) or "nothing")
    return table


def _sent(program: Program) -> list[str]:
    """One line for each set of axes: kinds of collectives are in the JSON."""
    sums: dict[tuple[str, bool], tuple[int, float]] = {}
    for c in program.collectives:
        key = ("+".join(c.axes), c.turn)
        count, size = sums.get(key, (0, 0.0))
        sums[key] = count + c.count, size + c.bytes
    return [
        f"{axes}: {size / GIB:.3g} GiB in {count}{' a turn of its loop' if turn else ''}"
        for (axes, turn), (count, size) in sums.items()
    ]


def record(report: Report, price: float | None, changes: list[Change]) -> dict[str, Any]:
    """The plan as JSON: bytes, seconds and FLOPs, with what it was made of."""
    name, peak = report.peak
    speed, target = report.speed, report.target
    chip = target.chip
    return {
        "plan": head_line(report),
        "compiled": report.compiled,
        "jax": jax.__version__,
        "target": {"name": str(target), "devices": target.size, "chip": vars(chip)},
        "compiling": None if report.compiling is None else report.compiling._asdict(),
        "mesh": dict(zip(AXES, report.config.mesh.shape, strict=True)),
        "parameters": {
            kind: weights_of(model).all
            for kind, model in (("policy", report.models.actor), ("critic", report.models.critic))
            if model is not None
        },
        "workload": report.work._asdict() | {"layout": vars(report.work.layout)},
        "notes": list(report.notes),
        "fits": report.fits,
        "limit_bytes": report.limit,
        "peak": {"while": name, "bytes": peak.total},
        "memory_bytes": {part: terms._asdict() for part, terms in report.memory.items()},
        "step_s": speed.step_s,
        "tokens_per_s_per_device": speed.tokens_per_device,
        "mfu": speed.mfu,
        "mfu_actor": speed.mfu_actor,
        "cost": None if price is None else {"price": price, "step": report.cost(price)},
        "parts": {
            part: {
                "seconds": found.seconds,
                "flops": found.flops,
                "sent_bytes": {"+".join(axes): size for axes, size in found.work.sent.items()},
            }
            for part, found in speed.parts.items()
        },
        "programs": [
            {
                "name": program.name,
                "compile_s": round(program.seconds, 2),
                "memory_bytes": program.memory._asdict(),
                "collectives": [c._asdict() for c in program.collectives],
            }
            for program in report.programs
        ],
        "changes": [change._asdict() for change in changes],
    }
