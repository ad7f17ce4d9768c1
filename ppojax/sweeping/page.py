"""A sweep as one page that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ppojax.reporting.chart import PARTS, bar_chart, text
from ppojax.reporting.document import parts_legend, style
from ppojax.reporting.tables import number
from ppojax.reporting.tables import table as markup
from ppojax.sweeping.figures import BOUNDS, LOSSES, SMALL, settled
from ppojax.sweeping.record import Record
from ppojax.sweeping.table import GIB, HEADS, MIB, head, rows
from ppojax.viewer.page import page

FORMULAS = (
    "Rewards: an untrained policy often earns none, and then losses are zero, so a cell's rows earn 0 or 1 by a coin "
    "made of their tokens; there is no warm start, evaluation or checkpoint.",
    "Tokens/s/device: tokens of the step's rows, prompts among them, over its seconds and the mesh's devices. Medians "
    "over the steps but the first, which compiles.",
    "MFU = FLOPs of the policy's update / (its seconds x devices x peak), with 6 FLOPs for each weight that a position "
    "meets, 6 L H (F + F_v) for each (query, key) pair, and 6 V D for each scored position (arXiv 2204.02311, appendix "
    "B; arXiv 2001.08361); what rematerialisation computes again is not counted; peak is the dense bfloat16 rate of "
    "the data sheet, and there is none for a CPU.",
    "Planned peak: what lies on the device with most between steps, and the most that one compiled program needs "
    "beside its arguments (temporaries and outputs, less what takes the arguments' place). Measured peak: "
    "peak_bytes_in_use, as the device tells; a CPU does not, and the peak resident memory of the process stands there, "
    "all of its devices, Python and the compiler included.",
    "Sent: bytes that each device sends in the policy's update of one step, all its mini-batches, by the axes of the "
    "mesh, read from the compiled program; ring algorithms are assumed. Below, in one call of each program; loops "
    "whose turns are known only as they run, such as decoding, count one turn.",
    "Compile s: all programs up to the end of the first step, the first time (cold), and in a second start that reads "
    "them from the cache.",
    f"First step: {', '.join(LOSSES)} against the first cell with the same critic; the largest |a - b| / max(|b|, "
    f"{SMALL}), with the bound {', '.join(f'{bound} in {dtype}' for dtype, bound in BOUNDS.items())}. Later "
    "mini-batches of the step have seen updates. Where rows were drawn differently, they cannot be compared.",
)


def document(records: Sequence[Record], *, title: str, arguments: Sequence[str]) -> str:
    """Write the page. `arguments` are those of the config."""
    parts = [
        f"<h1>{text(title)}</h1>",
        f"<p>{text(' '.join(arguments))}</p>",
        f"<p><strong>{text(head(records))}</strong></p>",
        _cells(records),
        *(f"<p class=soft>{text(words)}</p>" for words in FORMULAS),
        _time(records),
        _programs(records),
    ]
    return page(title, "\n".join(part for part in parts if part), style=style())


def _cells(records: Sequence[Record]) -> str:
    """The table; what a cell without figures says goes over all of their columns."""
    top = "".join(f"<th>{text(name)}</th>" for name in HEADS)
    body = []
    for row in rows(records):
        cells = [f"<td>{text(cell)}</td>" for cell in row]
        if len(row) < len(HEADS):
            cells[-1] = f"<td colspan={len(HEADS) - len(row) + 1}><strong>{text(row[-1])}</strong></td>"
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=wide><table><tr>{top}</tr>\n" + "\n".join(body) + "</table></div>"


def _time(records: Sequence[Record]) -> str:
    bars = []
    for record in records:
        if record.measured is None:
            continue
        known = {name: settled(record.measured, f"timing_s/{name}") or 0.0 for name in (*PARTS[:-1], "step")}
        known["gen"] = max(known["gen"] - known["env_wait"], 0.0)
        split = [known[name] for name in PARTS[:-1]]
        bars.append((record.cell.name, [*split, max(known["step"] - sum(split), 0.0)]))
    return f"<h2>Where a step's time goes</h2>{bar_chart(bars)}{parts_legend()}" if bars else ""


def _programs(records: Sequence[Record]) -> str:
    """The programs of each cell that send anything, or need a mebibyte."""
    out = []
    for record in records:
        for program in record.measured.programs if record.measured else ():
            if not program.sent and program.new < MIB:
                continue
            sent = ", ".join(f"{axes} {size / MIB:.3f}" for axes, size in sorted(program.sent.items()))
            memory = (number(size / GIB) for size in (program.arguments, program.new))
            out.append((text(record.cell.name), text(program.name), *memory, text(sent or "-")))
    names = ("cell", "program", "arguments, GiB", "beside them, GiB", "sent a call, MiB")
    return f"<h2>Compiled programs</h2>{markup(names, out)}" if out else ""
