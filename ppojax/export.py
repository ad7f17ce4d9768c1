"""Write a run as a Hugging Face folder: `python -m ppojax.export run=runs/quickstart out=models/quickstart`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console

from ppojax.cli import Flags, run_command
from ppojax.config import Config
from ppojax.errors import ConfigError, ExitCode
from ppojax.runtime.rundir import RunDir
from ppojax.settings import Settings


class ExportConfig(Settings):
    """An export of one checkpoint."""

    run: str = Field(min_length=1, description="folder of the run, such as runs/quickstart")
    out: str = Field(min_length=1, description="the folder to write; new or empty")
    step: Annotated[int, Field(ge=0)] | Literal["latest"] = Field(
        default="latest", description="step of the checkpoint, or the newest that is intact"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="of the weights in the files; checkpoints are float32"
    )
    adapter: bool = Field(
        default=False, description="write the adapters of a run with model.lora by themselves, as PEFT loads them"
    )
    shard_gigabytes: float = Field(default=5.0, gt=0, description="most gigabytes of weights in one file")


def main(settings: ExportConfig, flags: Flags) -> int:
    """Check the arguments against the run and the output folder, then restore the policy and write it."""
    run, out = RunDir(settings.run), Path(settings.out).expanduser()
    if not run.config.is_file():
        raise ConfigError(f"run={settings.run}: there is no run (no {run.config}); give the folder of one")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"out={settings.out}: is there and not empty; give a new folder")
    config = Config.load(f"config={run.config}")
    if settings.adapter:
        config.model.adapters()
    console = Console()
    if flags.dry_run:
        console.print(f"ok: a checkpoint of {run.path} would be written to {out}", soft_wrap=True)
        return ExitCode.DONE
    # Only now: jax takes seconds to start, and a mistyped key should not wait for it.
    from ppojax.trainer.exporting import export_run

    step = export_run(
        config,
        run,
        out,
        checkpoint=None if settings.step == "latest" else settings.step,
        dtype=settings.dtype,
        shard_bytes=int(settings.shard_gigabytes * 1e9),
        adapter=settings.adapter,
    )
    what = "adapters of step {} are" if settings.adapter else "policy of step {} is"
    console.print(f"the {what.format(step)} in {out}", soft_wrap=True)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], ExportConfig))
