"""Fit a critic to a run's stored rollouts: `python -m ppojax.critic_fit run=runs/warehouse out=critics/warehouse`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from ppojax.advantages import GAE
from ppojax.cli import Flags, run_command
from ppojax.config import Config
from ppojax.errors import ConfigError, ExitCode
from ppojax.runtime.rundir import RunDir
from ppojax.settings import Settings
from ppojax.update.settings import CriticConfig

if TYPE_CHECKING:
    from ppojax.trainer.fitting import Fitted


class CriticFitConfig(Settings):
    """A fit of one critic. It is used with critic.model.type=fitted critic.model.path=OUT."""

    run: str = Field(min_length=1, description="folder of the run whose rollouts are used, such as runs/quickstart")
    out: str = Field(min_length=1, description="the folder to write; new or empty")
    checkpoint: Annotated[int, Field(ge=0)] | Literal["latest"] = Field(
        default="latest", description="step of the policy that a critic may be cut from, or the newest that is intact"
    )
    critic: CriticConfig | None = Field(default=None, description="the critic; what is not given is as in the run")
    gae: GAE | None = Field(
        default=None, description="what makes its targets; what is not given is as in the run, or a default without GAE"
    )
    passes: int = Field(default=4, ge=1, description="passes over the stored rollouts")
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share of the prompts that are only looked at")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the order and of who is held out")

    @classmethod
    def base(cls, given: Mapping[str, Any]) -> CriticFitConfig | None:
        """The critic and the targets of the run."""
        run = RunDir(str(given.get("run")))
        if not run.config.is_file():
            return None
        played = Config.load(f"config={run.config}")
        return cls.model_construct(critic=played.critic, gae=_targets(played))


def main(settings: CriticFitConfig, flags: Flags) -> int:
    """Check the arguments against the run, fit, write the critic, and print what it explains."""
    run, out = RunDir(settings.run), Path(settings.out).expanduser()
    if not run.config.is_file():
        raise ConfigError(f"run={settings.run}: there is no run (no {run.config}); give the folder of one")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"out={settings.out}: is there and not empty; give a new folder")
    played = Config.load(f"config={run.config}")
    config = _with_critic(played, settings)
    console = Console()
    if played.kl_reward is not None:
        console.print("kl_reward: stored rewards are without the KL, and so are the targets", soft_wrap=True)
    if flags.dry_run:
        console.print(f"ok: a critic would be fitted to the rollouts of {run.path}", soft_wrap=True)
        return ExitCode.DONE
    # Only now: jax takes seconds to start, and a mistyped key should not wait for it.
    from ppojax.trainer.fitting import fit_run

    fitted = fit_run(
        played,
        config,
        run,
        out,
        checkpoint=None if settings.checkpoint == "latest" else settings.checkpoint,
        passes=settings.passes,
        share=settings.held_out,
        seed=settings.seed,
    )
    console.print(_table(fitted))
    console.print(f"use it with critic.model.type=fitted critic.model.path={out}", soft_wrap=True, markup=False)
    return ExitCode.DONE


def _with_critic(played: Config, settings: CriticFitConfig) -> Config:
    critic = played.critic if settings.critic is None else settings.critic
    if critic.count > 1 or critic.lora is not None:
        raise ConfigError("critic: one critic that is trained whole is fitted; set critic.count=1 and critic.lora=null")
    if critic.privileged:
        raise ConfigError("critic.privileged: transcripts do not hold what only a critic is shown; set it to 0")
    try:
        return Config(**dict(played) | {"critic": critic, "advantage": settings.gae or _targets(played)})
    except ConfigError as error:  # contradictions, in the keys of a run
        raise ConfigError(str(error).replace("advantage.", "gae.")) from error


def _targets(played: Config) -> GAE:
    return played.advantage if isinstance(played.advantage, GAE) else GAE()


def _table(fitted: Fitted) -> Table:
    table = Table(
        title=f"{fitted.rows} rows, {len(fitted.losses)} steps, loss {fitted.losses[0]:.4f} -> {fitted.losses[-1]:.4f}"
    )
    table.add_column(f"explained variance on {fitted.held_out} held-out rows")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("all", _number(fitted.before.whole), _number(fitted.after.whole))
    parts = len(fitted.after.by_part)
    for n, (before, after) in enumerate(zip(fitted.before.by_part, fitted.after.by_part, strict=True)):
        table.add_row(
            f"actions {100 * n // parts}% to {100 * (n + 1) // parts}% of a row", _number(before), _number(after)
        )
    return table


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.3f}"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], CriticFitConfig))
