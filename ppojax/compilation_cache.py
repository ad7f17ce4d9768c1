"""The folder that keeps compiled programs for the next start: whose it may be, and who may write there.

What lies there is native code that runs without being looked at, so nobody else may put any there.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from ppojax.errors import CannotWriteError, ConfigError, PpojaxError
from ppojax.lazy import jax

AUTO = "auto"
UNREAD_DAYS = 30  # after which a program is forgotten
MIN_SECONDS = 0.0  # of compilation from which on a program is kept
WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger(__name__)


def enable_compilation_cache(setting: str | None) -> Path | None:
    """Keep compiled programs across processes.

    Args:
        setting: a folder, made if it is not there; `auto`: the user's own (see `user_folder`), unless jax was told of
            one or told to keep none; None: keep none, also where jax was told of a folder.

    Returns:
        The folder in use. With `auto`, a folder that cannot be used is one warning, and nothing is kept.

    Raises:
        ConfigError: the folder that was named is another user's, or others may write in it.
        CannotWriteError: it cannot be made or written.
    """
    if setting is None:
        jax.config.update("jax_compilation_cache_dir", None)
    if setting is None or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    told = jax.config.values["jax_compilation_cache_dir"]
    if setting == AUTO and told is not None:
        return Path(told)
    folder = _if_usable(user_folder()) if setting == AUTO else _private(setting)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def user_folder() -> str:
    """`$XDG_CACHE_HOME/ppojax/compiled`, or `~/.cache/ppojax/compiled` where that variable names no absolute path."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return str(Path(base if Path(base).is_absolute() else "~/.cache", "ppojax", "compiled"))


@cache
def _if_usable(folder: str) -> Path | None:
    try:
        return _private(folder)
    except PpojaxError as error:
        log.warning("compiled programs are not kept for the next start: %s", error)
        return None


def _private(name: str) -> Path:
    """Make the folder, closed to others, or check that it is the user's own; one that is there stays as it is."""
    where = f"run.compilation_cache={name}"
    try:
        folder = Path(name).expanduser()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.geteuid():
            raise ConfigError(
                f"{where}: belongs to another user (id {status.st_uid}), and what lies there is run as native code; "
                "name a folder of your own, or null"
            )
        if status.st_mode & WRITTEN_BY_OTHERS:
            raise ConfigError(
                f"{where}: others may write there, and what lies there is run as native code; name another folder, or "
                "null, or see that all in it is yours and take that right from them (chmod go-w)"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _forget(folder)
    except OSError as error:
        raise CannotWriteError(f"{where}: cannot be written: {error.strerror}; name another folder, or null") from error
    except RuntimeError as error:  # of a ~ that stands for nothing
        raise ConfigError(f"{where}: {error}; name another folder, or null") from error
    return folder


def _forget(folder: Path) -> None:
    """Delete programs that have long not been read: jax lets the folder grow without end."""
    before = time.time() - UNREAD_DAYS * 24 * 3600
    for file in folder.glob("jit_*-cache"):  # other files may lie there, too
        with suppress(FileNotFoundError):  # another process deletes, too
            status = file.stat()
            if max(status.st_atime, status.st_mtime) < before:
                file.unlink()
