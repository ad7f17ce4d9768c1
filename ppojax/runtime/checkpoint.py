"""Checkpoints: any pytree of arrays plus a JSON record, written in the background, whole or not at all.

    checkpoints/20/  state/ (orbax)  meta.json  manifest.json

A step is assembled in `.20.tmp` and renamed into place last, so a folder with a plain number is complete: this holds
for a SIGKILL at any point. Orbax writes and reads the arrays; the order of things, the retention and the checks are
here, because `CheckpointManager` skips a save while one runs and commits before a manifest could be written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.tree_util import keystr, tree_flatten_with_path, tree_structure

from ppojax.errors import CannotWriteError, DataError
from ppojax.processes.exchange import gather
from ppojax.runtime.atomic import sync_directory, write_atomic
from ppojax.runtime.manifest import Damaged, Schema, check_schema, read_manifest, verify_files, write_manifest
from ppojax.runtime.settings import CheckpointConfig

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
STATE = "state"
META = "meta.json"


class Checkpoints:
    """The checkpoints of one run.

    Making the object and restoring write nothing, so a second process may read the checkpoints of a running one. The
    first save clears away what a killed process left behind.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = Path(directory).absolute()
        self.config = config
        self.failures = 0  # saves that were not written, over the life of the object
        self._failed_in_a_row = 0
        self._restored: int | None = None
        self._written: set[int] = set()
        self._damaged: set[int] = set()
        self._saving: tuple[int, Future[None]] | None = None
        # Orbax reports through absl, a failed write with a thousand lines; the errors reach us as exceptions.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    # Saving

    def save(self, step: int, state: Any, meta: dict[str, Any], *, block: bool = False) -> None:
        """Save `state` and `meta` as the checkpoint of `step`.

        Returns once the arrays are copied off the device (they may be donated then); with `block`, once the checkpoint
        is on the disk. A save that is still running is waited for, never skipped. `meta` is JSON.

        A checkpoint that the machine refuses (a full disk) is one warning as long as an older one stands. Raises
        CannotWriteError when none stands, at the third failure in a row, and in a run of many processes.
        """
        self.wait()
        if step in self._written:
            return
        arrays = _flatten(state)
        record = json.dumps({**meta, "step": step}, allow_nan=False)
        staging = self.directory / f".{step}.tmp"
        try:
            if not self._written:
                self._tidy(step)
            if jax.process_index() == 0:
                staging.mkdir(parents=True)
            self._orbax.save(staging / STATE, args=ocp.args.StandardSave(arrays))
        except (OSError, ValueError) as error:
            self._refused(step, staging, error)
            return
        self._saving = (step, self._worker.submit(self._commit, step, staging, record, _schema(arrays)))
        if block:
            self.wait()

    def save_last(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Save the checkpoint that a run ends with, on the disk.

        Raises CannotWriteError where it was not written, also where an older one stands. What this process has written
        is what counts: not every one of many sees the others' files.
        """
        self.save(step, state, meta, block=True)
        if step not in self._written:
            raise CannotWriteError(
                f"{self.directory}: the last checkpoint, of step {step}, was not written: make room, then resume=true "
                f"goes on from step {self.latest()}"
            )

    def wait(self) -> None:
        """Wait for the save in progress. Raises CannotWriteError as `save` does."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except (OSError, ValueError) as error:
            self._refused(step, self.directory / f".{step}.tmp", error)
            return
        gather(b"")  # of many processes the first gives the checkpoint its name: until then there is none
        self._written.add(step)
        self._failed_in_a_row = 0

    def close(self) -> None:
        """Wait for the save in progress and release the threads. Raises CannotWriteError as `save` does."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or jax.process_count() == 1:
            self.close()  # with a fault, the other processes do not come to what a save waits for

    def _commit(self, step: int, staging: Path, record: str, schema: Schema) -> None:
        """Finish the checkpoint in `staging`, give it its name, and drop the oldest ones (in the worker thread)."""
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        write_atomic(staging / META, record + "\n")
        write_manifest(staging, step, schema, hashed=self.config.verify)
        os.rename(staging, self.directory / str(step))
        sync_directory(self.directory)
        for old in self._steps()[: -self.config.keep]:
            _remove(self.directory / str(old))

    def _refused(self, step: int, staging: Path, error: OSError | ValueError) -> None:
        """Clear up after a save that the machine refused, and warn or give up."""
        reason = _storage_reason(error)
        if reason is None:
            raise error
        shutil.rmtree(staging, ignore_errors=True)
        self.failures += 1
        self._failed_in_a_row += 1
        latest = self.latest()
        if latest is None or self._failed_in_a_row >= MAX_FAILED_SAVES or jax.process_count() > 1:
            stands = "none stands" if latest is None else f"that of step {latest} stands"
            raise CannotWriteError(
                f"{self.directory}: the checkpoint of step {step} cannot be written: {reason}; {stands}; "
                "free some space and use resume=true"
            ) from error
        log.warning(
            "%s: the checkpoint of step %d was not written: %s; that of step %d stands (failure %d of %d)",
            *(self.directory, step, reason, latest, self._failed_in_a_row, MAX_FAILED_SAVES),
        )

    def _tidy(self, step: int) -> None:
        """Remove what a killed process left, and set aside checkpoints that this run does not build on."""
        if jax.process_index() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for stray in self.directory.glob(".*.tmp"):
            shutil.rmtree(stray)
        newest = self._restored if self._restored is not None else step - 1
        for other in self._steps():
            if other > newest or other in self._damaged:
                aside = self.directory / f"{other}.aside"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.directory / str(other), aside)
                log.warning("%s: the run does not build on the checkpoint of step %d: moved here", aside, other)

    # Restoring

    def latest(self) -> int | None:
        """Find the newest complete checkpoint; None when there is none. Its bytes are checked by `restore`."""
        return max((step for step in self._steps() if step not in self._damaged), default=None)

    def restore(self, step: int | None, template: Any, *, strict: bool = False) -> tuple[Any, dict[str, Any]]:
        """Load the checkpoint of `step`, or the newest that is intact when `step` is None.

        `template` has the structure, shapes, dtypes and shardings to load onto: arrays or ShapeDtypeStructs with a
        sharding (scalars too: on a mesh, a replicated NamedSharding). Arrays are bit-exact, on another mesh as well.
        Returns the state and `meta`, in which `step` is the step that was loaded.

        A damaged checkpoint is passed over with a warning; with `strict`, or when `step` is given, it raises DataError.
        So do a checkpoint whose arrays differ from the template's and a directory without an intact checkpoint.
        """
        self.wait()
        candidates = sorted(self._steps(), reverse=True) if step is None else [step]
        arrays = _flatten(template)
        for candidate in candidates:
            folder = self.directory / str(candidate)
            try:
                loaded, meta = self._load(folder, arrays)
            except Damaged as damage:
                if strict or step is not None:
                    raise DataError(
                        f"{folder}: the checkpoint is damaged: {damage}; remove the folder, "
                        "or use resume=true to go on from the step before"
                    ) from damage
                self._damaged.add(candidate)
                log.warning("%s: the checkpoint is damaged: %s; trying the one before", folder, damage)
                continue
            self._restored = candidate
            return jax.tree.unflatten(tree_structure(template), list(loaded.values())), meta
        raise DataError(f"{self.directory}: there is no intact checkpoint; start without resume")

    def _load(self, folder: Path, template: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        body = read_manifest(folder)
        verify_files(folder, body, hashed=self.config.verify)
        check_schema(folder, body, _schema(template))
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in template.items()
        }
        try:
            meta = json.loads((folder / META).read_bytes())
            loaded = self._orbax.restore(folder / STATE, args=ocp.args.StandardRestore(abstract))
        except (OSError, ValueError) as error:
            raise Damaged(str(error).splitlines()[0]) from error
        return {name: loaded[name] for name in template}, meta

    def _steps(self) -> list[int]:
        """List the steps of the complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if entry.name.isdecimal())


def _flatten(tree: Any) -> dict[str, Any]:
    """Name the leaves of a pytree by their path; orbax sees this flat dict, whatever the containers are."""
    leaves, _ = tree_flatten_with_path(tree)
    flat = {keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves have the same name"
    return flat


def _schema(arrays: dict[str, Any]) -> Schema:
    return {name: (str(leaf.dtype), tuple(leaf.shape)) for name, leaf in arrays.items()}


def _storage_reason(error: OSError | ValueError) -> str | None:
    """Say in a few words why the storage refused; None for an error that is not the storage's."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # tensorstore raises its I/O errors as ValueError, ending in the errno.
    _, found, code = str(error).partition("[os_error_code='")
    return os.strerror(int(code.partition("'")[0])) if found else None


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a half-removed one never carries its number."""
    doomed = folder.with_name(f".{folder.name}.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
