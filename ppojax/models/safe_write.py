"""Folders that are there whole or not at all, and the headers of safetensors files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ppojax.errors import CannotWriteError, ConfigError
from ppojax.models.hf import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_free(folder: Path) -> None:
    """Raise ConfigError where something is in the way."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there and not empty; give a new folder")


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all is written.

    Raises:
        ConfigError: the folder is there and not empty.
        CannotWriteError: the disk refuses.
    """
    check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield staging
            staging.chmod(0o755)
            os.rename(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CannotWriteError(f"{folder}: cannot be written: {error.strerror}; give another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write a file, down to the disk."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def header(tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]]) -> bytes:
    """The header of a safetensors file: its length, then JSON, padded to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, dtype in tensors:
        end = at + int(np.prod(shape)) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
