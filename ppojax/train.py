"""Train a policy: `python -m ppojax.train config=configs/quickstart.yaml [key=value ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from ppojax.cli import Flags, run_command
from ppojax.config import Config
from ppojax.errors import ExitCode
from ppojax.processes.resolve import here
from ppojax.processes.start import joined
from ppojax.runtime.rundir import RunDir


def main(config: Config, flags: Flags) -> int:
    """Check what can be checked cheaply, then run the session."""
    # Only now: a mistyped key should not wait for it.
    from rich.console import Console

    run, place = RunDir(Path(config.run.dir) / config.run.name), here(config.processes)
    console = Console(quiet=not place.writes)
    config.rollout.check_processes(place.count)
    if flags.dry_run:
        run.check(resume=config.resume is not False)
        config.rollout.build_mesh(config.mesh.build())
        console.print(f"ok: {config.steps} steps of {config.rollout.rows} episodes would go to {run.path}")
        return ExitCode.DONE
    with joined(place, config.processes, config.same_everywhere()) as watch:
        if place.writes:
            run.check(resume=config.resume is not False)
        # And only now: jax takes seconds to start.
        from ppojax.trainer.session import train

        train(config, run, console, watch)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
