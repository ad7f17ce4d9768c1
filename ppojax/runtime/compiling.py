"""Count what XLA compiles: a run that keeps compiling is a run with shapes that keep changing."""

from __future__ import annotations

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_hits"
_durations: list[float] = []
_cached: list[str] = []


def _listen_to_durations(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _COMPILED:
        _durations.append(duration_secs)


def _listen(event: str, **kwargs: str | int) -> None:
    if event == _READ:
        _cached.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen_to_durations)
jax.monitoring.register_event_listener(_listen)


def compile_metrics() -> dict[str, float]:
    """What this process has compiled.

    Returns:
        `compile/count`, programs compiled or read from the persistent cache; `compile/cached`, those of them that were
        read; `compile/seconds`, what both took, tracing apart.
    """
    seconds = {"compile/seconds": sum(_durations)}
    return {"compile/count": float(len(_durations)), "compile/cached": float(len(_cached)), **seconds}
