"""Plan a run without its hardware: `python -m ppojax.plan config=configs/h200/qwen3_8b_tools.yaml target=h200:8`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pydantic import Field
from rich.console import Console

from ppojax.cli import Flags, run_command
from ppojax.config import Config
from ppojax.errors import CannotWriteError, ConfigError, ExitCode
from ppojax.host_devices import environment_with
from ppojax.planning.targets import SPELLINGS, parse_target
from ppojax.runtime.atomic import write_atomic

GIB = 2.0**30


class PlanConfig(Config):
    """A run, and what it is planned for. Rows are taken to be full unless `row_tokens` says otherwise."""

    target: str = Field(min_length=1, description=f"the machine: {SPELLINGS}")
    price: float | None = Field(default=None, gt=0, description="dollars that one device costs an hour")
    out: str | None = Field(default=None, min_length=1, description="JSON file to write the plan to")
    compile: bool = Field(
        default=True, description="compile the programs for the target; false: an estimate by formula, in a second"
    )
    prompt_tokens: int | None = Field(
        default=None, ge=1, description="tokens of a prompt; null: rollout.max_prompt_tokens, or a quarter of a row"
    )
    row_tokens: int | None = Field(default=None, ge=8, description="tokens of a row; null: rollout.max_tokens")
    segments: int = Field(default=1, ge=1, description="rows of an episode, where its history is compacted")
    memory_share: float = Field(
        default=0.92,
        gt=0,
        le=1,
        description="share of a device's memory that programs may take; the rest is for its context, the buffers of "
        "collectives and holes",
    )


def main(settings: PlanConfig, flags: Flags) -> int:
    """Plan, print tables, and write the JSON that was asked for; exit 2 where the run does not fit."""
    target = parse_target(settings.target)
    console = Console()
    if flags.dry_run:
        console.print(f"ok: would be planned for {target}, {target.size} devices", soft_wrap=True)
        return ExitCode.DONE
    # Before jax is loaded, which is only now: a plan needs no accelerator, and should take no memory of one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if target.chip.platform == "cpu":
        os.environ.update(environment_with(target.size))
    from ppojax.planning import table
    from ppojax.planning.advice import advise
    from ppojax.planning.planner import Assumed, make_plan

    assumed = Assumed(settings.prompt_tokens, settings.row_tokens, settings.segments, settings.memory_share)
    report = make_plan(settings, target, assumed, compiling=settings.compile)
    changes = [] if report.fits else advise(report, assumed)
    console.print(table.head_line(report), soft_wrap=True, markup=False)
    console.print(table.memory_table(report), table.time_table(report, settings.price))
    if report.programs:
        console.print(table.program_table(report))
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if settings.out is not None:
        _write(settings.out, json.dumps(table.record(report, settings.price, changes), indent=1) + "\n")
        console.print(f"written to {settings.out}", soft_wrap=True, markup=False)
    if report.fits:
        return ExitCode.DONE
    name, peak = report.peak
    lines = [
        f"target={target}: {name} needs {peak.total / GIB:.1f} GiB of a device, expected at most "
        f"{report.limit / GIB:.1f}; what helps most:"
    ]
    for change in changes:
        enough = "fits" if change.bytes <= report.limit else "not yet enough"
        lines.append(f"  {change.settings}: about {change.bytes / GIB:.1f} GiB, {enough}")
    raise ConfigError("\n".join(lines))


def _write(out: str, text: str) -> None:
    try:
        write_atomic(Path(out).expanduser(), text)
    except OSError as error:
        raise CannotWriteError(f"out={out}: cannot be written: {error.strerror}; name another file") from error


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], PlanConfig))
