"""Compare meshes and micro-batches: `python -m ppojax.sweep config=configs/tiny.yaml mesh=1x8x1,2x4x1 steps=5`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field
from rich.console import Console

from ppojax.cli import Flags, run_command
from ppojax.errors import CannotWriteError, ConfigError, ExitCode, PpojaxError
from ppojax.planning.targets import parse_target
from ppojax.runtime.atomic import write_atomic
from ppojax.settings import Settings
from ppojax.sweeping.cells import Cell, cells_of
from ppojax.sweeping.figures import figures, to_csv
from ppojax.sweeping.page import document
from ppojax.sweeping.record import Record
from ppojax.sweeping.run import How, check, run_cells
from ppojax.sweeping.table import reasons, table

PAGE, CSV = "sweep.html", "sweep.csv"


class SweepConfig(Settings):
    """A sweep. All other arguments (config=a.yaml, rollout.prompts=8, ...) are those of the run that is measured."""

    mesh: str = Field(
        default="",
        description="meshes, with commas between: devices along data x fsdp x tensor, such as 1x8x1,2x4x1, or along "
        "data x fsdp x expert x tensor; none: the config's",
    )
    microbatch: str = Field(default="", description="values of update.microbatch_rows, with commas between")
    critic: str = Field(
        default="",
        description="critics, with commas between: blocks cut from the actor (6), critics x blocks (2x6), or what "
        "critic.model.path may be",
    )
    steps: int = Field(default=5, ge=1, description="training steps of each cell; the first compiles")
    cached: bool = Field(default=True, description="start each cell once more, to see what compiled programs save")
    out: str = Field(
        default="sweep",
        min_length=1,
        description="the folder of the page, the CSV and what was measured; what has been measured there is kept",
    )
    limit_s: float = Field(default=3600.0, gt=0, description="seconds that a process of a cell may take")
    target: str = Field(
        default="", description="plan for a machine instead of running, as `python -m ppojax.plan` does: h200:8"
    )
    compile: bool = Field(default=True, description="compile plans for the target; false: estimates by formula")
    price: float | None = Field(default=None, gt=0, description="dollars that one device of the target costs an hour")
    title: str = Field(default="Sweep", description="headline of the page")


class FailedCellsError(PpojaxError):
    """Some cells have no result; the exit code is that of the first one."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode.of(code)


def sweep(settings: SweepConfig, arguments: Sequence[str], flags: Flags) -> int:
    """Check every cell, run those that can be, and write table, page and CSV, after each of them anew."""
    cells = cells_of(settings.mesh, settings.microbatch, settings.critic)
    console = Console()
    faults = {cell: check(cell, arguments) for cell in cells}
    if all(faults.values()):
        raise ConfigError(_faults(faults, check(Cell(), arguments)))
    if flags.dry_run:
        for cell, lines in faults.items():
            _say(console, f"{cell.name}: {'invalid: ' if lines else 'ok'}{'; '.join(lines)}")
        return ExitCode.DONE
    how = How(
        *(tuple(arguments), settings.steps, settings.cached, settings.limit_s, Path(settings.out).expanduser()),
        _plan(settings),
    )
    records: list[Record] = []
    for record in run_cells(cells, how):
        records.append(record)
        _say(console, f"{len(records)}/{len(cells)} {record.cell.name}: {_told(record, records)}")
        _write(how.folder, records, settings.title, arguments)
    console.print(table(records))
    for line in reasons(records):
        _say(console, line)
    _say(console, f"written to {how.folder / PAGE} and {how.folder / CSV}")
    failed = [record for record in records if record.state == "failed"]
    if failed:
        told = "; ".join(f"{record.cell.name}: {record.reason}" for record in failed)
        raise FailedCellsError(f"{len(failed)} of {len(records)} cells failed: {told}", failed[0].code)
    return ExitCode.DONE


def _faults(faults: Mapping[Cell, Sequence[str]], base: Sequence[str]) -> str:
    """What is wrong in every cell, and without one, is told once."""
    common = [line for line in base if all(line in lines for lines in faults.values())]
    own = [f"{cell.name}: {line}" for cell, lines in faults.items() for line in lines if line not in common]
    return "\n".join([*common, *own])


def _plan(settings: SweepConfig) -> tuple[str, ...]:
    if not settings.target:
        return ()
    parse_target(settings.target)
    price = () if settings.price is None else (f"price={settings.price}",)
    return (f"target={settings.target}", f"compile={str(settings.compile).lower()}", *price)


def _told(record: Record, records: Sequence[Record]) -> str:
    if record.state != "done":
        return f"{record.state}: {record.reason}"
    return f"{figures(record, records)['tokens_per_second_per_device']:.1f} tokens/s/device"


def _write(folder: Path, records: Sequence[Record], title: str, arguments: Sequence[str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / PAGE, document(records, title=title, arguments=arguments))
        write_atomic(folder / CSV, to_csv(records))
    except OSError as error:
        raise CannotWriteError(f"out={folder}: cannot be written: {error.strerror}; name another folder") from error


def _say(console: Console, words: str) -> None:
    console.print(words, soft_wrap=True, markup=False, highlight=False)


def command(argv: Sequence[str]) -> int:
    """Tell the sweep's own settings from those of the run, and sweep."""
    mine = [a for a in argv if a.startswith("-") or a.partition("=")[0] in SweepConfig.model_fields]
    theirs = [a for a in argv if a not in mine]

    def main(settings: SweepConfig, flags: Flags) -> int:
        return sweep(settings, theirs, flags)

    return run_command(main, mine, SweepConfig)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
