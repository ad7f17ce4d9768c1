"""A run of many processes from its meeting to the end of each."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ppojax.errors import ExitCode, PpojaxError
from ppojax.lazy import jax
from ppojax.processes.meeting import Watch, meet
from ppojax.processes.resolve import Place
from ppojax.processes.settings import ProcessesConfig


@contextmanager
def joined(place: Place, settings: ProcessesConfig, config: str) -> Iterator[Watch | None]:
    """Meet the other processes and start `jax.distributed`; leave together. One process alone has nothing to do.

    A fault inside ends this process at once, after its lines or its trace, and is told to the others, which end with
    the same exit code: what is left of them waits for a collective that never comes.

    Args:
        config: text that has to be the same in all of them.

    Raises:
        PeerError, ConfigError: they do not all come, or do not agree (see `meet`).
    """
    if place.alone:
        yield None
        return
    lines, service = meet(place, settings, config)
    watch = Watch(place, lines, float(settings.heartbeat_s))
    try:
        _start_jax(place, settings, service)
        yield watch
    except PpojaxError as error:
        _leave(watch, error.exit_code, str(error), _lines(error))
    except KeyboardInterrupt:
        _leave(watch, ExitCode.INTERRUPTED, "interrupted")
    except BaseException as error:
        if (other := watch.cause()) is not None:
            _leave(watch, other.exit_code, str(other), _lines(other))
        _leave(watch, ExitCode.BUG, repr(error), traceback.format_exc())
        raise  # never reached, but for tests that replace the end of the process
    watch.end(ExitCode.DONE, "done")


def _start_jax(place: Place, settings: ProcessesConfig, service: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        service,
        place.count,
        place.index,
        list(place.local_devices) if place.local_devices else None,
        cluster_detection_method="deactivate",
        coordinator_bind_address=service if service.startswith("127.") else None,
        initialization_timeout=settings.timeout_s,
        heartbeat_timeout_seconds=2 * settings.heartbeat_s,  # ours speaks first
    )


def _lines(error: PpojaxError) -> str:
    return "".join(f"ppojax: error: {line}\n" for line in str(error).splitlines())


def _leave(watch: Watch, code: int, reason: str, printed: str = "") -> None:
    """End this process without the exit handlers of jax, which wait for all others."""
    try:
        watch.end(code, reason)
        sys.stderr.write(printed)
        if watch.place.index == 0:
            watch.wait()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # though nobody may read any more
        os._exit(code)
