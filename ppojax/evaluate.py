"""Try a run's policy on held-out tasks: `python -m ppojax.evaluate run=runs/quickstart [key=value ...]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from ppojax.cli import Flags, run_command
from ppojax.config import Config
from ppojax.errors import CannotWriteError, ConfigError, ExitCode
from ppojax.runtime.atomic import write_atomic
from ppojax.runtime.rundir import RunDir
from ppojax.settings import Settings

OUTPUT = "evaluation.json"


class EvaluateConfig(Settings):
    """An evaluation of one checkpoint."""

    run: str = Field(min_length=1, description="folder of the run, such as runs/quickstart")
    checkpoint: Annotated[int, Field(ge=0)] | Literal["latest"] = Field(
        default="latest", description="step of the checkpoint, or the newest that is intact"
    )
    prompts: int = Field(default=64, ge=1, description="held-out tasks: the first ones of the run's own")
    samples: int | None = Field(
        default=None, ge=1, description="sampled answers a task, for pass@k; null: eval.samples"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the sampled answers; the tasks are the run's")


def main(settings: EvaluateConfig, flags: Flags) -> int:
    """Check the arguments against the run, evaluate, print a table and leave `evaluation.json` in the run."""
    run = RunDir(settings.run)
    if not run.config.is_file():
        raise ConfigError(f"run={settings.run}: there is no run (no {run.config}); give the folder of one")
    config = Config.load(f"config={run.config}")
    tasks = config.env.tasks("eval", config.seed)
    if settings.prompts > len(tasks):
        raise ConfigError(
            f"prompts={settings.prompts}: the run's environment has {len(tasks)} held-out tasks; ask for {len(tasks)} "
            "or fewer"
        )
    console = Console()
    if flags.dry_run:
        console.print(f"ok: {settings.prompts} held-out tasks of {run.path} would be tried", soft_wrap=True)
        return ExitCode.DONE
    # Only now: jax takes seconds to start, and a mistyped key should not wait for it.
    from ppojax.trainer.held_out import evaluate_run

    samples = config.eval.samples if settings.samples is None else settings.samples
    step, metrics = evaluate_run(
        config,
        run,
        tasks[: settings.prompts],
        checkpoint=None if settings.checkpoint == "latest" else settings.checkpoint,
        samples=samples,
        seed=settings.seed,
    )
    record = {
        "checkpoint": step,
        "prompts": settings.prompts,
        "samples": samples,
        "seed": settings.seed,
        "temperature": config.rollout.temperature,
        "metrics": metrics,
    }
    _write(run, record)
    console.print(_table(run, record))
    console.print(f"written to {run.path / OUTPUT}", soft_wrap=True)
    return ExitCode.DONE


def _write(run: RunDir, record: Mapping[str, Any]) -> None:
    path = run.path / OUTPUT
    try:
        write_atomic(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise CannotWriteError(
            f"{path}: cannot be written: {error.strerror}; free or unlock the run's folder"
        ) from error


def _table(run: RunDir, record: Mapping[str, Any]) -> Table:
    metrics = record["metrics"]
    table = Table(title=f"{run.path}, step {record['checkpoint']}: {record['prompts']} held-out tasks")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("95% interval", justify="right")
    interval = f"{metrics['val/success_low']:.3f} - {metrics['val/success_high']:.3f}"
    table.add_row("greedy success", f"{metrics['val/success']:.3f}", interval)
    table.add_row("greedy reward/mean", f"{metrics['val/reward/mean']:.3f}", "")
    for name, value in metrics.items():
        if name.startswith("val/pass@"):
            how = f"{record['samples']} samples, temperature {record['temperature']:g}"
            table.add_row(f"{name.removeprefix('val/')} ({how})", f"{value:.3f}", "")
    return table


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], EvaluateConfig))
