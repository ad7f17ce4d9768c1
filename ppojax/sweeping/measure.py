"""Measure one cell, in a process of its own: `python -m ppojax.sweeping.measure OUT STEPS ARGUMENT...`."""

from __future__ import annotations

import hashlib
import math
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import jax
import numpy as np

from ppojax.cli import run_command
from ppojax.config import Config
from ppojax.envs import Task
from ppojax.errors import ExitCode
from ppojax.models.forward import Params
from ppojax.planning.collectives import collectives
from ppojax.rollout.collect import Collector
from ppojax.rollout.tasks import task_stream
from ppojax.runtime.age import process_age
from ppojax.runtime.atomic import write_atomic
from ppojax.runtime.compiling import compile_metrics
from ppojax.sweeping.record import Measured, ProgramUse, Start
from ppojax.trainer import Trainer
from ppojax.trainer.player import Player
from ppojax.types import Rollout, Row

KEPT = (
    "timing_s/",
    "perf/",
    "actor/loss",
    "actor/grad_norm",
    "critic/loss",
    "critic/grad_norm",
    "compile/",
    "reward/mean",
)
SAMPLING = ("empty", "prefill", "extend", "share", "decode")
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class ByCoin(Collector):
    """The same episodes, but those earn 1 whose tokens hash to an odd number, and the others nothing.

    An untrained policy often earns nothing at all, and a step without rewards has losses and gradients of zero.
    """

    def __call__(
        self, params: Params, tasks: Sequence[Task], key: jax.Array, abandoned: Event | None = None
    ) -> Rollout:
        """Play `group_size` episodes of each task to their end; see `Collector`."""
        played = super().__call__(params, tasks, key, abandoned)
        return replace(played, rows=tuple(map(_earn_by_coin, played.rows)))


def _earn_by_coin(row: Row) -> Row:
    reward = np.zeros_like(row.reward)
    reward[np.flatnonzero(row.action)[-1:]] = int(_digest(row), 16) % 2
    return replace(row, reward=reward)


def measure(config: Config, steps: int) -> Measured:
    """Do the first steps of a run, and look at what they took."""
    trainer = Trainer(config)
    parts = replace(trainer.parts, collector=ByCoin(**vars(trainer.parts.collector)))
    stream = task_stream(parts.train_tasks, config.rollout.prompts, config.seed)
    trainer.parts, trainer.player = parts, Player(config, parts, stream)
    begun, done, rows = process_age(), [], ()
    for number in range(steps):
        out = trainer.step()
        done.append({name: _finite(x) for name, x in out.metrics.items() if name.startswith(KEPT)})
        if number == 0:
            rows = tuple(map(_digest, out.rollout.rows))
    trainer.close()
    compiled, mesh = compile_metrics(), parts.mesh
    return Measured(
        platform=mesh.devices.flat[0].platform,
        device=mesh.devices.flat[0].device_kind,
        devices=parts.devices,
        steps=tuple(done),
        rows=rows,
        state_bytes=_state_bytes(),
        peak_bytes=_peak_bytes(mesh),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
        programs=tuple(_programs(mesh, parts.collector.sampler.mesh)),
        start=Start(
            seconds=begun,
            compiled=int(compiled["compile/count"]),
            cached=int(compiled["compile/cached"]),
            compile_seconds=compiled["compile/seconds"],
            steps=steps,
        ),
    )


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _digest(row: Row) -> str:
    return hashlib.sha256(row.token.tobytes()).hexdigest()[:12]


def _state_bytes() -> int:
    """Bytes of the arrays that lie on the device with most of them."""
    held: dict[Any, int] = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)


def _peak_bytes(mesh: jax.sharding.Mesh) -> int | None:
    """The most that a device has had in use, where devices tell."""
    told = [device.memory_stats() for device in mesh.devices.flat if device.process_index == jax.process_index()]
    peaks = [stats["peak_bytes_in_use"] for stats in told if stats and "peak_bytes_in_use" in stats]
    return max(peaks, default=None)


def _programs(mesh: jax.sharding.Mesh, sampling: jax.sharding.Mesh) -> Iterator[ProgramUse]:
    """The programs of this process that run on the whole mesh, its own or that of sampling."""
    for program in mesh.devices.flat[0].client.live_executables():
        module = program.hlo_modules()[0]
        name = module.name.removeprefix("jit_")
        on = sampling if name in SAMPLING else mesh
        if len(program.local_devices()) != len(on.local_devices):
            continue
        memory = program.get_compiled_memory_stats()
        new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        sent: dict[str, float] = {}
        for one in collectives(module.to_string(), dict(on.shape)) if on.size > 1 else ():
            axes = "+".join(one.axes)
            sent[axes] = sent.get(axes, 0.0) + one.bytes
        yield ProgramUse(name=name, arguments=memory.argument_size_in_bytes, new=new, sent=sent)


def main(argv: Sequence[str]) -> int:
    """Measure, and write what was found."""
    out, steps, *arguments = argv

    def measured(config: Config, flags: object) -> int:
        write_atomic(Path(out), measure(config, int(steps)).model_dump_json(indent=1))
        return ExitCode.DONE

    return run_command(measured, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
