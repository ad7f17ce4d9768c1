"""The run directory.

config.yaml  metrics.jsonl  rollouts/step_NNNNNN.jsonl  tensorboard/  checkpoints/  exit.json
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ppojax.errors import CannotWriteError, ConfigError, ExitCode
from ppojax.runtime.atomic import write_atomic

log = logging.getLogger(__name__)


class RunDir:
    """Paths of one run. Making the object touches nothing; `create` is the first write."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.exit = self.path / "exit.json"

    def transcript(self, step: int) -> Path:
        """Name the file of the transcripts of `step`."""
        return self.rollouts / f"step_{step:06d}.jsonl"

    def check(self, *, resume: bool) -> None:
        """Check that a run may start here, writing nothing (for `--dry-run`).

        Raises ConfigError when the directory holds something and `resume` is false, CannotWriteError when it cannot
        be read.
        """
        try:
            occupied = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
            usable = not self.path.exists() or self.path.is_dir()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if not usable:
            raise ConfigError(f"{self.path}: is not a directory; choose another run.name or run.dir")
        if occupied and not resume:
            raise ConfigError(
                f"{self.path}: the run directory is not empty; use resume=true to go on with that run, "
                "or another run.name"
            )

    def create(self, *, resume: bool = False) -> None:
        """Make the directory and its folders, and take away the `exit.json` of an earlier attempt.

        With `resume` a directory that does not exist yet is made as well, so that one command line serves the first
        start and every restart. Raises ConfigError as `check` does, CannotWriteError when nothing can be written.
        """
        self.check(resume=resume)
        try:
            for folder in (self.path, self.rollouts, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            self.exit.unlink(missing_ok=True)
            probe = self.path / ".probe"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def write_config(self, text: str) -> None:
        """Write the resolved config. Raises CannotWriteError."""
        try:
            write_atomic(self.config, text)
        except OSError as error:
            raise _cannot_write(self.config, error) from error

    def write_exit(
        self, code: ExitCode | int, reason: str, step: int | None, last_checkpoint: int | None, hint: str
    ) -> None:
        """Write `exit.json`: why the run ended, where it stood and what to do next.

        Never raises for the machine's sake: the fault that ends the run is worth more than the one met in noting it.
        """
        record = {
            "code": int(code),
            "reason": reason,
            "step": step,
            "last_checkpoint": last_checkpoint,
            "hint": hint,
        }
        try:
            write_atomic(self.exit, json.dumps(record, indent=2) + "\n")
        except OSError as error:
            log.warning("%s: cannot be written: %s", self.exit, error.strerror)


def _cannot_write(path: Path, error: OSError) -> CannotWriteError:
    return CannotWriteError(f"{path}: cannot be written: {error.strerror}; choose a writable run.dir")
