"""What a step took: seconds of its parts, tokens a second, arithmetic over peak."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

from ppojax.models.flops import experience_flops, peak_flops
from ppojax.models.spec import DecoderSpec
from ppojax.types import Experience, Layout, Row


class Meter:
    """A stopwatch of one step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure the part of the step inside; a part that comes again adds up."""
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def forget(self, name: str) -> None:
        """Leave out a part that did nothing."""
        self._seconds.pop(name, None)

    def performance(self, rows: Sequence[Row], devices: int) -> dict[str, float]:
        """Seconds of the step and its parts, and tokens of rows a second and device."""
        seconds = time.perf_counter() - self._start
        tokens = sum(len(row.token) for row in rows)
        return {
            **{f"timing_s/{name}": value for name, value in self._seconds.items()},
            "timing_s/step": seconds,
            "perf/time_per_step": seconds,
            "perf/total_num_tokens": float(tokens),
            "perf/throughput": tokens / seconds / devices,
        }

    def utilisation(
        self, spec: DecoderSpec, experience: Experience, layout: Layout, epochs: int, mesh: jax.sharding.Mesh
    ) -> dict[str, float]:
        """Arithmetic of the actor's update over its time, and over the peak of the devices where that is known."""
        seconds = self._seconds.get("update_actor")
        if not seconds:
            return {}
        rate = epochs * experience_flops(spec, experience, layout) / seconds / mesh.size
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        done = {"perf/actor_tflops": rate / 1e12}
        return done if peak is None else done | {"perf/mfu": rate / peak}
