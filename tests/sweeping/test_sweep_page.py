"""The table, the page and the CSV of a sweep, from records that a real one left (benchmarks/results/sweep)."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from html_page import Page
from ppojax.sweeping.cells import Cell
from ppojax.sweeping.figures import compare, figures, reference_of, settled, to_csv
from ppojax.sweeping.page import document
from ppojax.sweeping.record import Planned, Record
from ppojax.sweeping.table import CPU_NOTE, HEADS, head, reasons, rows, table

LEFT = Path(__file__).resolve().parents[2] / "benchmarks/results/sweep/tiny_cpu.jsonl"
RECORDS = [Record.model_validate_json(line) for line in LEFT.read_text().splitlines()]
DONE = [record for record in RECORDS if record.state == "done"]
PLAN = Planned(
    target="h200:8",
    device="NVIDIA H200",
    devices=8,
    compiled=False,
    fits=False,
    limit_bytes=2.0**37,
    peak_bytes=2.0**38,
    step_seconds=12.0,
    tokens_per_second_per_device=321.0,
    mfu=0.2,
    mfu_actor=0.3,
    dollars=0.1,
    compile_seconds=0.0,
    sent={"fsdp": 2.0**30, "data+fsdp": 0.0},
)


def changed(record: Record, loss: float | None, row: str = "") -> Record:
    """The same cell, with another loss in its first step, and another first row."""
    assert record.measured is not None
    steps = ({**record.measured.steps[0], "actor/loss": loss}, *record.measured.steps[1:])
    drawn = (row or record.measured.rows[0], *record.measured.rows[1:])
    return record.model_copy(update={"measured": record.measured.model_copy(update={"steps": steps, "rows": drawn})})


def test_every_mesh_and_microbatch_takes_the_same_first_step() -> None:
    assert len(DONE) == 6 and {record.state for record in RECORDS if record not in DONE} == {"invalid"}
    reference = reference_of(DONE[-1], RECORDS)
    assert reference is not None and reference is DONE[0] and compare(reference, reference).words == "reference"
    for record in DONE[1:]:
        equal = compare(record, reference)
        assert equal.words == "equal" and equal.rows == 0 and equal.of == 32, record.cell
        assert equal.difference is not None and equal.difference < 1e-6
        assert record.measured is not None and record.measured.steps[0]["actor/grad_norm"]


def test_other_losses_are_seen() -> None:
    reference = DONE[0]
    equal = compare(changed(DONE[1], 1.5), changed(reference, 1.0))
    assert equal.words == "DIFFERENT" and equal.difference == pytest.approx(0.5)
    equal = compare(changed(DONE[1], 1.5, row="another"), changed(reference, 1.0))
    assert equal.words == "1 of 32 rows drawn differently"
    other = DONE[1].model_copy(update={"cell": Cell(critic="2")})
    assert reference_of(other, [*RECORDS, other]) is other  # another critic is another reference


def test_what_only_one_has_is_a_difference() -> None:
    """A metric that is not finite is kept as null."""
    for mine, theirs in ((None, 1.0), (1.0, None)):
        record, reference = changed(DONE[1], mine), changed(DONE[0], theirs)
        assert rows([reference, record])[1][-1] == "DIFFERENT: only one is finite"
    assert compare(changed(DONE[1], None), changed(DONE[0], None)).words == "equal"  # the other numbers
    empty = [
        record.model_copy(update={"measured": record.measured.model_copy(update={"steps": ({},)})})
        for record in DONE[:2]
        if record.measured is not None
    ]
    assert [row[-1] for row in rows(empty)] == ["reference", "-"]


def test_figures_leave_the_first_step_out() -> None:
    measured = DONE[0].measured
    assert measured is not None and len(measured.steps) == 3
    seconds = [step["timing_s/step"] or 0 for step in measured.steps]
    assert settled(measured, "timing_s/step") == pytest.approx(sum(seconds[1:]) / 2) and seconds[0] > seconds[1]
    assert settled(measured.model_copy(update={"steps": measured.steps[:1]}), "timing_s/step") == seconds[0]
    assert settled(measured, "perf/mfu") is None  # nobody states the peak of a CPU
    told = figures(DONE[0], RECORDS)
    assert told["planned_peak_bytes"] == measured.state_bytes + max(p.new for p in measured.programs)
    cold, cached = told["compile_seconds_cold"], told["compile_seconds_cached"]
    assert isinstance(cold, float) and isinstance(cached, float) and cached < cold / 5


def test_what_is_sent_is_that_of_all_minibatches() -> None:
    record = next(record for record in DONE if record.cell.mesh == "1x8x1x1").model_copy(update={"updates": 3})
    assert record.measured is not None
    once = record.measured.sent("actor_step")
    assert set(once) == {"fsdp"}
    assert figures(record, RECORDS)["sent_bytes_actor_update_fsdp"] == 3 * once["fsdp"]


def test_the_table_says_what_its_figures_are() -> None:
    assert head(RECORDS).endswith(CPU_NOTE)
    for row, record in zip(rows(RECORDS), RECORDS, strict=True):
        assert row[:3] == list(record.cell)
        assert len(row) == (len(HEADS) if record.state == "done" else 4)
    out = io.StringIO()
    Console(file=out, width=200).print(table(RECORDS))
    assert "1x8x1x1" in out.getvalue() and "not a performance result" in out.getvalue()
    assert [line.split(": ")[1] for line in reasons(RECORDS)] == ["invalid", "invalid"]
    assert head([record for record in RECORDS if record.state == "invalid"]) == "No cell was measured."


def test_the_page_stands_alone() -> None:
    hostile = DONE[1].model_copy(
        update={"state": "failed", "measured": None, "reason": "</td><script>alert(1)</script>"}
    )
    text = document([*RECORDS, hostile], title="a <b> sweep", arguments=["config=a.yaml", "x='<i>'"])
    page = Page(text)
    assert "alert(1)" not in "".join(content for _, _, content in page.all("script"))
    assert not re.search(r"(src|href)=", text) and "<b> sweep" not in text and "<i>" not in text
    spans = [attrs.get("colspan") for _, attrs, _ in page.all("td") if "colspan" in attrs]
    assert spans == [str(len(HEADS) - 3)] * 3  # two cells that cannot be, and one that failed
    assert CPU_NOTE in text and "MFU = FLOPs of the policy" in text and "Where a step" in text
    assert len(page.all("rect")) > 6


def test_the_csv_has_a_row_for_each_cell() -> None:
    read = list(csv.DictReader(io.StringIO(to_csv(RECORDS))))
    assert [(row["mesh"], row["microbatch"], row["state"]) for row in read] == [
        (record.cell.mesh, record.cell.microbatch, record.state) for record in RECORDS
    ]
    assert float(read[2]["sent_bytes_actor_update_fsdp"]) > 0 and read[0]["sent_bytes_actor_update_fsdp"] == ""
    assert "mesh.fsdp may be 1, 2, 4, 8" in read[-1]["reason"]


def test_plans_are_told_as_plans() -> None:
    record = Record(cell=Cell("1x8x1x1"), key="k", state="done", planned=PLAN)
    assert head([record]) == "Plans for h200:8 (NVIDIA H200), estimated by formula; nothing was run."
    memory = ["256.000: does not fit, limit 128.000", "-"]
    assert rows([record]) == [[*record.cell, "321.0", "12", "0.300", *memory, "fsdp 1024.00", "- / -", "-"]]
    assert "does not fit" in document([record], title="t", arguments=())
