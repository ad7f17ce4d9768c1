"""Look at a run's episodes, token by token: `python -m ppojax.view run=runs/quickstart [step=12 html=out.html]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console

from ppojax.cli import Flags, run_command
from ppojax.errors import CannotWriteError, ConfigError, DataError, ExitCode
from ppojax.runtime.atomic import write_atomic
from ppojax.settings import Settings
from ppojax.viewer.colours import Quantity
from ppojax.viewer.page import figure, page
from ppojax.viewer.run import StepEntry, StepFile, find_steps


class ViewConfig(Settings):
    """A look at the transcripts of one run."""

    run: str = Field(min_length=1, description="folder of the run, such as runs/quickstart")
    step: Annotated[int, Field(ge=0)] | Literal["latest"] = Field(
        default="latest", description="the step to open, or the newest that has transcripts"
    )
    episode: int | None = Field(default=None, ge=0, description="the episode to open; null: the first of the step")
    colour: Quantity = Field(default="advantage", description="what the tokens are coloured by")
    html: str | None = Field(
        default=None, min_length=1, description="write the episode to this file, as a page by itself; null: terminal"
    )


def main(settings: ViewConfig, flags: Flags) -> int:
    """Find the episode, then write its page, or show it in the terminal."""
    steps = find_steps(settings.run)
    at = _find(steps, settings)
    step = StepFile(steps[at])
    summary = step.episodes[0] if settings.episode is None else step.find(settings.episode)
    console = Console()
    if flags.dry_run:
        console.print(f"ok: step {step.step}, episode {summary.number} would be shown", soft_wrap=True)
        return ExitCode.DONE
    if settings.html is None:
        return _show(steps, at, summary.number, settings)
    title = f"{settings.run}, step {step.step}, episode {summary.number}"
    text = page(title, figure(step.episode(summary), step.scale, title=title, shown=settings.colour))
    path = Path(settings.html).expanduser()
    try:
        write_atomic(path, text)
    except OSError as error:
        raise CannotWriteError(
            f"html={settings.html}: cannot be written: {error.strerror}; name another file"
        ) from error
    console.print(f"step {step.step}, episode {summary.number} is in {path}", soft_wrap=True, markup=False)
    return ExitCode.DONE


def _find(steps: list[StepEntry], settings: ViewConfig) -> int:
    if settings.step == "latest":
        return len(steps) - 1
    numbers = [entry.step for entry in steps]
    if settings.step not in numbers:
        raise DataError(
            f"step={settings.step}: run={settings.run} has no transcript of that step; it has {len(numbers)}, "
            f"{numbers[0]} to {numbers[-1]}"
        )
    return numbers.index(settings.step)


def _show(steps: list[StepEntry], at: int, number: int, settings: ViewConfig) -> int:
    if not sys.stdout.isatty():
        raise ConfigError("the viewer needs a terminal; html=FILE writes the episode as a page")
    # Only now: an extra, which a page does not need.
    try:
        from ppojax.viewer.app import Viewer
    except ImportError as error:
        raise ConfigError(
            f"the viewer cannot be imported ({error}): pip install 'ppojax[view]'; html=FILE writes a page without it"
        ) from error
    viewer = Viewer(settings.run, steps, at, number, settings.colour)
    viewer.run()
    return viewer.return_code or ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], ViewConfig))
