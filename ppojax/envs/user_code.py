"""Functions of the user: found by import path, called with a time limit, their failures handed back as values."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ppojax.errors import ConfigError

MAX_ABANDONED = 64  # calls that ran out of time and go on running


@dataclass(frozen=True)
class Outcome:
    """What a call gave: a value, or the exception that it raised."""

    value: Any = None
    error: BaseException | None = None

    def unwrap(self) -> Any:
        """Give the value. Raises what the call raised."""
        if self.error is not None:
            raise self.error
        return self.value


@cache
def load_function(path: str, key: str) -> Callable[..., Any]:
    """Load a function by `package.module:function` or `folder/file.py:function`.

    Modules are found as Python finds them, and in the current folder. `key` is the setting that names the path.
    Raises ConfigError.
    """
    source, _, name = path.rpartition(":")
    if not source or not name.isidentifier():
        raise ConfigError(f"{key}={path}: expected module:function or file.py:function")
    module = _load_file(Path(source), key) if source.endswith(".py") else _load_module(source, key)
    function = vars(module).get(name)
    if not callable(function):
        there = ", ".join(n for n, f in vars(module).items() if callable(f) and not n.startswith("_")) or "none"
        raise ConfigError(f"{key}={path}: {source} has no function {name}; expected one of: {there}")
    return function


def call_limited(function: Callable[[], Any], timeout_s: float | None) -> Outcome:
    """Call a function; after `timeout_s` seconds it is left behind and the outcome is a TimeoutError.

    A Python thread cannot be stopped: a call that is left behind goes on until it ends by itself. With `MAX_ABANDONED`
    of them running, a further call is a RuntimeError at once. Code that must be stopped belongs into a process.
    """
    if timeout_s is None:
        return _attempt(function)
    if sum(thread.name == _NAME for thread in threading.enumerate()) >= MAX_ABANDONED:
        return Outcome(error=RuntimeError(f"{MAX_ABANDONED} calls that ran out of time are still running"))
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: outcomes.put(_attempt(function)), name=_NAME, daemon=True)
    thread.start()
    try:
        return outcomes.get(timeout=timeout_s)
    except queue.Empty:
        return Outcome(error=TimeoutError(f"no answer within {timeout_s:g} s"))


_NAME = "ppojax-user-code"


def _attempt(function: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(function())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may raise anything, SystemExit too
        return Outcome(error=error)


def _load_module(name: str, key: str) -> ModuleType:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(_cannot(key, name, error)) from error
    finally:
        if added:
            sys.path.remove(here)


@cache
def _load_file(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{key}={path}: no such file; the path is taken from {Path.cwd()}")
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
    name = f"ppojax_user_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(_cannot(key, str(path), error)) from error
    return module


def _cannot(key: str, name: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{key}: {name} cannot be imported ({type(error).__name__}: {said:.200})"
