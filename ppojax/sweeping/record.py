"""What is kept of a cell, as a JSON file of its own: a sweep that was stopped goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from ppojax.component import Component
from ppojax.config import Config
from ppojax.runtime.atomic import write_atomic
from ppojax.sweeping.cells import Cell

DEVICES = ("nvidia[0-9]*", "accel[0-9]*")  # in /dev, where there are GPUs or TPUs

State = Literal["done", "invalid", "failed"]


class ProgramUse(Component):
    """One compiled program: bytes of a device beside its arguments, and those that it sends along each axis a call."""

    name: str
    arguments: int
    new: int
    sent: Mapping[str, float]


class Start(Component):
    """How a process began."""

    seconds: float  # from its start to its first step
    compiled: int
    cached: int  # of those, read from the cache
    compile_seconds: float  # of all steps
    steps: int


class Measured(Component):
    """What a process found out about a cell."""

    platform: str
    device: str
    devices: int
    steps: tuple[Mapping[str, float | None], ...]  # metrics of each
    rows: tuple[str, ...]  # digests of the first step's, in order
    state_bytes: int  # of the device that holds most, between steps
    peak_bytes: int | None  # of the device that had most, as it tells; None where it does not
    peak_rss_bytes: int  # of the process on the host
    programs: tuple[ProgramUse, ...]
    start: Start

    @property
    def planned_bytes(self) -> int:
        """Peak of a device by its programs: what lies there between steps, and the most that one needs beside it."""
        return self.state_bytes + max((program.new for program in self.programs), default=0)

    def sent(self, program: str) -> dict[str, float]:
        """Bytes that a device sends along each axis in a call of a program; the largest of the programs so named."""
        found = [p.sent for p in self.programs if p.name == program]
        return dict(max(found, key=lambda sent: sum(sent.values()), default={}))


class Planned(Component):
    """What the planner says of a cell; see `ppojax.plan`."""

    target: str
    device: str
    devices: int
    compiled: bool
    fits: bool
    limit_bytes: float
    peak_bytes: float
    step_seconds: float
    tokens_per_second_per_device: float
    mfu: float
    mfu_actor: float
    dollars: float | None  # a step
    compile_seconds: float
    sent: Mapping[str, float]  # in the policy's update of a step, by axes

    @classmethod
    def read(cls, text: str) -> Planned:
        """Read the JSON that the planner writes. Raises ValueError, KeyError or TypeError for any other."""
        told = json.loads(text)
        return cls(
            target=told["target"]["name"],
            device=told["target"]["chip"]["name"],
            devices=told["target"]["devices"],
            compiled=told["compiled"],
            fits=told["fits"],
            limit_bytes=told["limit_bytes"],
            peak_bytes=told["peak"]["bytes"],
            step_seconds=told["step_s"],
            tokens_per_second_per_device=told["tokens_per_s_per_device"],
            mfu=told["mfu"],
            mfu_actor=told["mfu_actor"],
            dollars=None if told["cost"] is None else told["cost"]["step"],
            compile_seconds=sum(program["compile_s"] for program in told["programs"]),
            sent=told["parts"]["actor"]["sent_bytes"],
        )


class Record(Component):
    """A cell and what became of it."""

    cell: Cell
    key: str  # of the settings that it was measured with
    state: State
    reason: str = ""
    code: int = 0
    dtype: str = ""
    updates: int = 1  # of the policy in a step
    measured: Measured | None = None
    again: Start | None = None  # with everything compiled before
    planned: Planned | None = None

    @classmethod
    def begin(cls, cell: Cell, config: Config, how: Sequence[object]) -> Record:
        """The record of a cell that nothing is known of yet; `how` it is run, as JSON, is part of its key."""
        told = config.model_copy(update={"run": type(config.run)()}).to_yaml()
        key = hashlib.sha256(json.dumps([told, *how]).encode()).hexdigest()[:16]
        updates = config.update.epochs * config.update.minibatches
        return cls(cell=cell, key=key, state="failed", dtype=config.model.dtype, updates=updates)


def versions() -> tuple[str, ...]:
    """What compiles."""
    return tuple(f"{name} {version(name)}" for name in ("jax", "jaxlib"))


def platform() -> tuple[str, ...]:
    """What computes, as far as it can be told without starting jax."""
    found = [pattern for pattern in DEVICES if any(Path("/dev").glob(pattern))]
    return os.environ.get("JAX_PLATFORMS", ""), *found


def read_record(path: Path) -> Record | None:
    """Read the record of a cell; None where there is none that can be used."""
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def write_record(path: Path, record: Record) -> None:
    """Write the record of a cell. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, record.model_dump_json(indent=1) + "\n")
