"""What every command shares: arguments to settings, `--help`, `--print-config`, and one line for each fault."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppojax.config import Config
from ppojax.errors import ExitCode, PpojaxError
from ppojax.settings import Settings, help_text, load_config

FLAGS = ("--help", "--print-config", "--dry-run")


@dataclass(frozen=True)
class Flags:
    """What a command is told besides its settings."""

    dry_run: bool = False


@dataclass(frozen=True)
class _Arguments:
    settings: tuple[str, ...]  # config=... and key=value; misspelled flags too, for the loader to report
    flags: frozenset[str]
    section: str  # of --help


def run_command(main: Callable[[Any, Flags], int], argv: Sequence[str], cls: type[Settings] = Config) -> int:
    """Turn arguments into settings of class `cls`, run `main` with them, and return the exit code of the process.

    A `PpojaxError` is printed as one line for each fault and becomes its exit code. Any other exception passes
    through: it is a bug, and Python prints the trace and exits with 1.
    """
    _plain_warnings()
    try:
        arguments = _split(argv)
        if "--help" in arguments.flags:
            sys.stdout.write(help_text(cls, arguments.section) if arguments.section else _usage(main, cls))
            return ExitCode.DONE
        loaded = load_config(cls, arguments.settings, FLAGS)
        if "--print-config" in arguments.flags:
            sys.stdout.write(loaded.annotated_yaml())
            return ExitCode.DONE
        return main(loaded.config, Flags(dry_run="--dry-run" in arguments.flags))
    except PpojaxError as error:
        for line in str(error).splitlines():
            print(f"ppojax: error: {_printable(line)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ppojax: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED


def _plain_warnings() -> None:
    """Print what the library logs as plain lines, whatever handlers other libraries put on the root logger."""
    logger = logging.getLogger("ppojax")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ppojax: %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def _split(argv: Sequence[str]) -> _Arguments:
    settings: list[str] = []
    flags: set[str] = set()
    section = ""
    for position, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        name = "--help" if name == "-h" else name
        if name == "--help":
            flags.add(name)
            following = argv[position + 1] if position + 1 < len(argv) else ""
            section = value or ("" if "=" in following or following.startswith("-") else following)
        elif argument in FLAGS:
            flags.add(argument)
        else:
            settings.append(argument)
    return _Arguments(tuple(settings), frozenset(flags), section)


def _usage(main: Callable[[Any, Flags], int], cls: type[Settings]) -> str:
    command = Path(inspect.getfile(main)).stem
    purpose = (inspect.getdoc(inspect.getmodule(main)) or "").split("\n")[0]
    return (
        f"{purpose}\n\n"
        f"usage: python -m ppojax.{command} [config=a.yaml,b.yaml] [key.sub=value ...] [FLAG ...]\n\n"
        "  config=a.yaml,b.yaml  read and merge files, left to right; key.sub=value wins over them\n"
        "  --dry-run             check everything short of loading weights; exit 0, or 2 with all that is wrong\n"
        "  --print-config        print every setting and where its value came from\n"
        "  --help [SECTION]      print this, or the keys of a section such as `actor.optimizer`\n\n"
        f"{help_text(cls)}"
    )


def _printable(text: str) -> str:
    """Spell out control characters: what a file contains must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
