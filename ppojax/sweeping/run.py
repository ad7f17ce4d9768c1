"""Run the cells of a sweep, one after another, each in processes of its own; what has been done stays done."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from ppojax.config import Config
from ppojax.errors import CannotWriteError, ConfigError, ExitCode
from ppojax.host_devices import environment_with
from ppojax.sweeping.cells import Cell
from ppojax.sweeping.record import Measured, Planned, Record, platform, read_record, versions, write_record

# What a cell does not need: they would be counted as its steps, or change what its first step sees.
PLAIN = (
    *("warm_start=null", "eval.every=0", "checkpoint.every=0", "run.tensorboard=false", "resume=false"),
    "critic.warmup_steps=0",  # steps in which the policy does not learn
)
RECORD = "record.json"
CACHED_STEPS = 1  # of the start with everything compiled before


class How(NamedTuple):
    """How cells are run."""

    arguments: tuple[str, ...]  # of the config
    steps: int
    cached: bool  # start once more, with everything compiled
    limit_s: float  # of one process
    folder: Path
    plan: tuple[str, ...] = ()  # plan instead, with these arguments: target=... and what else the planner takes

    @property
    def key(self) -> tuple[object, ...]:
        """What a result depends on besides the config."""
        return ("plan", *versions(), *self.plan) if self.plan else (self.steps, self.cached, *versions(), *platform())

    def settles(self, record: Record) -> bool:
        """Whether a record is all that was asked for: a plan that could not be compiled may be by now."""
        estimated = record.planned is not None and not record.planned.compiled
        return record.state == "done" and not (estimated and "compile=true" in self.plan)


def run_cells(cells: Sequence[Cell], how: How) -> Iterator[Record]:
    """Run what has not been run with these settings; what failed is tried again.

    Raises:
        CannotWriteError: a record cannot be written.
        ConfigError: a folder that is to be a cell's is something else.
    """
    for cell in cells:
        _check_ours(how.folder / cell.name)
    for cell in cells:
        path = how.folder / cell.name / RECORD
        try:
            config = cell.config([*how.arguments, *PLAIN])
        except ConfigError as error:
            yield Record(cell=cell, key="", state="invalid", reason=_one_line(error), code=ExitCode.CONFIG)
            continue
        new, record = Record.begin(cell, config, how.key), read_record(path)
        if record is None or not how.settles(record) or record.key != new.key:
            try:
                record = _run(new, _devices(config), how)
                write_record(path, record)
            except OSError as error:
                raise CannotWriteError(f"{path}: cannot be written: {error.strerror}; name another out=") from error
        yield record


def check(cell: Cell, arguments: Sequence[str]) -> list[str]:
    """Say why a cell cannot be, as far as its config tells; nothing where it may."""
    try:
        cell.config([*arguments, *PLAIN])
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _check_ours(folder: Path) -> None:
    """Refuse a folder with files in it that are no cell's: it is emptied when the cell is run."""
    try:
        if not folder.is_dir() or (folder / RECORD).is_file() or not any(folder.iterdir()):
            return
    except OSError as error:
        raise CannotWriteError(f"{folder}: cannot be read: {error.strerror}; name another out=") from error
    raise ConfigError(f"{folder}: is to be the folder of a cell, and holds files that no sweep left; name another out=")


def _devices(config: Config) -> int:
    rollout = config.rollout
    return config.mesh.size + (rollout.mesh.size if rollout.devices == "own" and rollout.mesh is not None else 0)


def _one_line(error: ConfigError) -> str:
    return "; ".join(str(error).splitlines())


def _run(record: Record, devices: int, how: How) -> Record:
    folder = how.folder / record.cell.name
    shutil.rmtree(folder, ignore_errors=True)
    write_record(folder / RECORD, record.model_copy(update={"reason": "was not finished"}))
    if how.plan:
        return _plan(folder, record, how)
    try:
        first = _measure(folder, record, devices, how, how.steps)
        if first.measured is None or not how.cached:
            return first
        again = _measure(folder, record, devices, how, CACHED_STEPS)
        if again.measured is None:
            return again.model_copy(update={"reason": f"when started again: {again.reason}"})
        return first.model_copy(update={"again": again.measured.start})
    finally:
        shutil.rmtree(folder / "compiled", ignore_errors=True)


def _measure(folder: Path, record: Record, devices: int, how: How, steps: int) -> Record:
    """Measure in a process of its own, and read what it found."""
    out = folder / "measured.json"
    settings = [*how.arguments, *PLAIN, *record.cell.arguments(), f"run.compilation_cache={folder / 'compiled'}"]
    out.unlink(missing_ok=True)
    ended = _process(["ppojax.sweeping.measure", str(out), str(steps), *settings], folder, devices, how.limit_s)
    if ended.code != 0:
        return _without(record, ended)
    try:
        measured = Measured.model_validate_json(out.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        return _without(record, Ended(1, f"left no measurement ({error!s:.80})"))
    return record.model_copy(update={"state": "done", "measured": measured})


def _plan(folder: Path, record: Record, how: How) -> Record:
    """Plan in a process of its own; a plan that does not fit is one, too."""
    out = folder / "plan.json"
    settings = [*how.arguments, *PLAIN, *record.cell.arguments(), *how.plan, f"out={out}"]
    ended = _process(["ppojax.plan", *settings], folder, None, how.limit_s)
    try:
        planned = Planned.read(out.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = ended if ended.code else Ended(1, f"left no plan ({error!s:.80})")
        return _without(record, told)
    return record.model_copy(update={"state": "done", "planned": planned})


class Ended(NamedTuple):
    """How a process ended, and why where it failed."""

    code: int
    reason: str = ""


def _process(module: Sequence[str], folder: Path, devices: int | None, limit_s: float) -> Ended:
    """Run a module of ours, with so many host devices; None: as many as there are."""
    command, path = [sys.executable, "-m", *module], folder / "log.txt"
    environment = None if devices is None else environment_with(devices)
    with path.open("a", encoding="utf-8") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            told = f"was not done after limit_s={limit_s:g} seconds; see {path}, or raise limit_s"
            return Ended(ExitCode.WATCHDOG, told)
    return Ended(done.returncode, _reason(path, done.returncode) if done.returncode else "")


def _without(record: Record, ended: Ended) -> Record:
    """The record of a cell without a result."""
    state = "invalid" if ended.code == ExitCode.CONFIG else "failed"
    return record.model_copy(update={"state": state, "reason": ended.reason, "code": int(ended.code)})


def _reason(log: Path, code: int) -> str:
    """What a process said last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}; see {log}"
    told = [line.partition("ppojax: error: ")[2] for line in lines if line.startswith("ppojax: error: ")]
    return "; ".join(told) if told else f"{lines[-1][:200] if lines else 'said nothing'} (exit {code}); see {log}"
