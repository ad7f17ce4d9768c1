"""What a checkpoint folder must hold: arrays by name, shape and dtype, and files by size and sha256.

Orbax loads a flipped byte, casts a wrong dtype and misreports a wrong shape; the manifest is there to say so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppojax.errors import DataError
from ppojax.runtime.atomic import write_atomic

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK_BYTES = 1 << 22

# Array name -> (dtype, shape), as in ("float32", (49152, 576)).
Schema = dict[str, tuple[str, tuple[int, ...]]]


class Damaged(Exception):
    """A checkpoint folder is not what was written. Never leaves `runtime`."""


def write_manifest(folder: Path, step: int, schema: Schema, *, hashed: bool) -> None:
    """Write the manifest of every file now in `folder`; with `hashed`, with their sha256. Raises OSError."""
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, file_sha256(path) if hashed else None]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    body = {"format": FORMAT, "step": step, "arrays": schema, "files": files}
    write_atomic(folder / MANIFEST, json.dumps({"sha256": _body_sha256(body), "body": body}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of `folder`. Raises Damaged when it is not as written."""
    try:
        record = json.loads((folder / MANIFEST).read_bytes())
        body = record["body"]
        intact = record["sha256"] == _body_sha256(body)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{MANIFEST} cannot be read") from error
    if not intact:
        raise Damaged(f"{MANIFEST} is not as it was written")
    if body["format"] != FORMAT:
        raise DataError(f"{folder}: checkpoint format {body['format']}, this ppojax reads format {FORMAT}")
    return body


def verify_files(folder: Path, body: Mapping[str, Any], *, hashed: bool) -> None:
    """Check every file of the manifest by size and, with `hashed`, by sha256. Raises Damaged naming the file."""
    for name, (size, digest) in body["files"].items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                raise Damaged(f"{name} has {path.stat().st_size} bytes, {size} were written")
            if hashed and digest is not None and file_sha256(path) != digest:
                raise Damaged(f"{name} fails its sha256")
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from error


def check_schema(folder: Path, body: Mapping[str, Any], expected: Schema) -> None:
    """Compare the arrays of a checkpoint with those this run builds. Raises DataError naming the first difference."""
    stored: Schema = {name: (dtype, tuple(shape)) for name, (dtype, shape) in body["arrays"].items()}
    names = [name for name in {**expected, **stored} if stored.get(name) != expected.get(name)]
    if not names:
        return
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    raise DataError(
        f"{folder}: {names[0]} is {_describe(stored.get(names[0]))} in the checkpoint and "
        f"{_describe(expected.get(names[0]))} in this run{more}; resume with the settings of the run that wrote it, "
        "or start another run.name"
    )


def file_sha256(path: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _body_sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _describe(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{entry[0]}{list(entry[1])}"
