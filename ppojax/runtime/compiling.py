"""Count what XLA compiles: a run that keeps compiling is a run with shapes that keep changing."""

from __future__ import annotations

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_durations: list[float] = []


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _EVENT:
        _durations.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_metrics() -> dict[str, float]:
    """Programs compiled (or read from the persistent cache) by this process, and the seconds that took."""
    return {"compile/count": float(len(_durations)), "compile/seconds": sum(_durations)}
