"""A program compiled ahead of time, and what it will need: memory of each device, and collectives."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from ppojax.planning.collectives import Collective, collectives


class Memory(NamedTuple):
    """Bytes of one device, as the compiled program says. Outputs that take their arguments' place are `aliased`."""

    arguments: int
    outputs: int
    temporary: int
    aliased: int

    @property
    def new(self) -> int:
        """What is needed beside the arguments while it runs."""
        return self.temporary + self.outputs - self.aliased


class Compiling(NamedTuple):
    """What compiling took in all: seconds by the clock, of processors, and on how many cores."""

    wall_s: float
    processor_s: float
    cores: int


class Program(NamedTuple):
    """What a compiled program says of itself; `seconds`: by the clock, with others compiled beside it."""

    name: str
    memory: Memory
    collectives: tuple[Collective, ...]
    seconds: float


def inspect(name: str, lowered: Any, mesh: jax.sharding.Mesh) -> Program:
    """Compile what was lowered for a mesh, and read it. Nothing runs."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    return Program(name, memory_of(compiled), collectives_of(compiled, mesh), seconds)


def inspect_all(
    asked: Sequence[tuple[str, Callable[[], Any], jax.sharding.Mesh]],
) -> tuple[tuple[Program, ...], Compiling]:
    """Lower programs one after another and compile them beside each other, one a core: XLA lets go of Python's lock.

    The last is begun with: in a step that is the policy's update, which takes longest.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    start, used = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(cores) as pool:
        waiting = [pool.submit(inspect, name, lower(), mesh) for name, lower, mesh in reversed(asked)]
        programs = tuple(job.result() for job in reversed(waiting))
    return programs, Compiling(time.perf_counter() - start, time.process_time() - used, cores)


def memory_of(compiled: Any) -> Memory:
    """Memory of each device that a compiled program needs."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
    )


def collectives_of(compiled: Any, mesh: jax.sharding.Mesh) -> tuple[Collective, ...]:
    """The collectives of a compiled program, by the axes of its mesh."""
    return () if mesh.size == 1 else collectives(compiled.as_text(), dict(mesh.shape))
