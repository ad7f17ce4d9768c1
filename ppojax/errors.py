"""The ways a run can end, and the error that stands for each."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; once there is a run directory, `exit.json` in it says the same and why."""

    DONE = 0
    BUG = 1
    CONFIG = 2
    DATA = 3
    DIVERGED = 4
    WATCHDOG = 70
    CANNOT_WRITE = 73
    PREEMPTED = 75
    INTERRUPTED = 130  # what a shell reports for Ctrl-C

    @classmethod
    def of(cls, code: int) -> ExitCode:
        """The exit code of this number; that of a bug where there is none."""
        return cls(code) if code in set(map(int, cls)) else cls.BUG


class PpojaxError(Exception):
    """A fault of the input or the machine, not of the program: one line for the user and an exit code."""

    exit_code = ExitCode.BUG


class ConfigError(PpojaxError):
    """A setting is unknown, ill-typed, out of range, or contradicts another one."""

    exit_code = ExitCode.CONFIG


class DataError(PpojaxError):
    """Weights, a tokenizer, a task or a checkpoint cannot be used."""

    exit_code = ExitCode.DATA


class DivergedError(PpojaxError):
    """Training produced non-finite gradients too many times in a row."""

    exit_code = ExitCode.DIVERGED


class PeerError(PpojaxError):
    """Another process of the run never came, or is gone."""

    exit_code = ExitCode.WATCHDOG


class PeerEnded(PpojaxError):
    """Another process of the run ended with a fault, and this one ends with the same exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode.of(code)


class CannotWriteError(PpojaxError):
    """The run directory or a checkpoint cannot be written."""

    exit_code = ExitCode.CANNOT_WRITE


class Preempted(PpojaxError):
    """The process was asked to stop; its state is saved."""

    exit_code = ExitCode.PREEMPTED
