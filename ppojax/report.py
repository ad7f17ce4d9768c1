"""Compare runs on one page: `python -m ppojax.report runs=runs/ppo-*,runs/grpo-* out=report.html`."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field
from rich.console import Console

from ppojax.cli import Flags, run_command
from ppojax.errors import CannotWriteError, DataError, ExitCode
from ppojax.reporting.document import document
from ppojax.reporting.methods import group
from ppojax.reporting.runs import find_runs
from ppojax.runtime.atomic import write_atomic
from ppojax.settings import Settings


class ReportConfig(Settings):
    """A comparison of runs. Runs that differ in nothing but their seed are one method."""

    runs: str = Field(min_length=1, description="folders of runs, or patterns, with commas between: runs/ppo-*,runs/a")
    out: str = Field(default="report.html", min_length=1, description="the page to write")
    names: str = Field(default="", description="what the methods are called, with commas between, in their order")
    tasks: str = Field(
        default="",
        description="settings that tell tasks apart, not methods, with commas between, such as env: a method's runs on "
        "several tasks count together, and are drawn task by task",
    )
    title: str = Field(default="Comparison of runs", description="headline of the page")
    last: int = Field(
        default=5, ge=1, description="steps at the end of a run that count for its final reward and for its critic"
    )
    episodes: int = Field(default=2, ge=0, le=20, description="transcripts of each method")


def main(settings: ReportConfig, flags: Flags) -> int:
    """Read the runs, group them, and write the page."""
    runs = find_runs(settings.runs)
    if not any(run.steps for run in runs):
        raise DataError("runs: none of them has done a step, so there is nothing to compare; wait for the first")
    methods = group(runs, tasks=_split(settings.tasks), names=_split(settings.names))
    console = Console()
    if flags.dry_run:
        console.print(f"ok: {len(runs)} runs of {len(methods)} methods would be compared", soft_wrap=True)
        return ExitCode.DONE
    text = document(methods, title=settings.title, last=settings.last, episodes=settings.episodes)
    path = Path(settings.out).expanduser()
    try:
        write_atomic(path, text)
    except OSError as error:
        raise CannotWriteError(f"out={settings.out}: cannot be written: {error.strerror}; name another file") from error
    for method in methods:
        console.print(f"{method.name}: {', '.join(run.name for run in method.runs)}", soft_wrap=True, markup=False)
    console.print(f"written to {path}", soft_wrap=True, markup=False)
    return ExitCode.DONE


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], ReportConfig))
