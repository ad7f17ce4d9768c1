import errno
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from runtime_states import assert_same_bits, folders, save_steps, template_of

from ppojax.errors import CannotWriteError
from ppojax.runtime.atomic import write_atomic
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.settings import CheckpointConfig


def test_what_a_killed_save_left_is_ignored_and_then_cleared(tmp_path):
    states = save_steps(tmp_path, [1])
    shutil.copytree(tmp_path / "1", tmp_path / ".2.tmp")
    (tmp_path / ".2.tmp" / "manifest.json").unlink()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.restore(None, template_of(states[1]), strict=True)
        checkpoints.save(2, states[1], {})
    assert folders(tmp_path) == ["1", "2"]


class FileSizeLimit:
    """The kernel refuses to write a file beyond `size` bytes, as a full disk would."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.former = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.former[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.former)


def big_state():
    # Random bits: compression must not make them fit.
    return {"x": jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32))}


def test_a_refused_save_is_a_warning_while_an_older_one_stands(tmp_path, caplog, capfd, monkeypatch):
    state = big_state()
    # Other tests, and libraries that they import, leave handlers that write to streams of their own.
    monkeypatch.setattr(logging.root, "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("ppojax"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("ppojax"), "propagate", True)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, {}, block=True)
        with FileSizeLimit(1 << 20):
            checkpoints.save(2, state, {}, block=True)
            checkpoints.save(3, state, {}, block=True)
            with pytest.raises(CannotWriteError, match=r"of step 4 cannot be written: File too large; that of step 1 "):
                checkpoints.save(4, state, {}, block=True)
        assert checkpoints.failures == 3
        assert folders(tmp_path) == ["1"]
        checkpoints.save(5, state, {}, block=True)  # the disk has room again
        restored, _ = checkpoints.restore(None, template_of(state), strict=True)
    assert_same_bits(restored, state)
    warnings = [record.getMessage() for record in caplog.records if record.name == "ppojax.runtime.checkpoint"]
    assert len(warnings) == 2 and all("\n" not in text for text in warnings)
    assert "of step 2 was not written: File too large; that of step 1 stands (failure 1 of 3)" in warnings[0]
    assert capfd.readouterr().err == ""


def test_the_last_checkpoint_has_to_be_written(tmp_path, monkeypatch):
    state = big_state()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, {}, block=True)
        told = r"the last checkpoint, of step 2, was not written: make room, then resume=true goes on from step 1"
        with FileSizeLimit(1 << 20), pytest.raises(CannotWriteError, match=told):
            checkpoints.save_last(2, state, {})
        monkeypatch.setattr(checkpoints, "_steps", list)  # as in a process that does not see the first one's files
        checkpoints.save_last(3, state, {})
    assert folders(tmp_path) == ["1", "3"]


def test_a_success_starts_the_count_of_failures_again(tmp_path):
    state = big_state()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, {}, block=True)
        for step in (2, 4, 6):
            with FileSizeLimit(1 << 20):
                checkpoints.save(step, state, {}, block=True)
                checkpoints.save(step, state, {}, block=True)
            checkpoints.save(step + 1, state, {}, block=True)
        assert checkpoints.failures == 6 and checkpoints.latest() == 7


def test_a_refused_first_save_ends_the_run(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with FileSizeLimit(1 << 20), pytest.raises(CannotWriteError, match="none stands; free some space"):
        checkpoints.save(1, big_state(), {}, block=True)
    checkpoints.close()
    assert folders(tmp_path) == []


def test_a_full_disk_reported_in_the_background_surfaces_at_the_next_save(tmp_path, monkeypatch, caplog):
    state = {"x": jnp.ones(3)}

    refused = threading.Event()

    def full(path, text):
        refused.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, {}, block=True)
        monkeypatch.setattr("ppojax.runtime.checkpoint.write_atomic", full)
        checkpoints.save(2, state, {})
        assert refused.wait(timeout=60)
        monkeypatch.undo()
        assert not caplog.records
        checkpoints.save(3, state, {}, block=True)
    assert "step 2 was not written: No space left on device" in caplog.text
    assert folders(tmp_path) == ["1", "3"]


def test_an_error_that_is_not_the_storage_is_not_swallowed(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(ValueError, match="JSON compliant"):
        checkpoints.save(1, {"x": jnp.ones(3)}, {"loss": float("nan")})


def test_write_atomic_leaves_the_old_file_when_the_new_one_does_not_fit(tmp_path):
    write_atomic(tmp_path / "a", "old")
    with FileSizeLimit(100), pytest.raises(OSError, match="too large"):
        write_atomic(tmp_path / "a", "x" * 1000)
    assert (tmp_path / "a").read_text() == "old"
    assert folders(tmp_path) == ["a"]


SAVING = """
import sys
import jax.numpy as jnp, numpy as np
from pathlib import Path
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.settings import CheckpointConfig
noise = np.random.default_rng(0).integers(0, 2**32, 1 << 19, dtype=np.uint32)
with Checkpoints(Path(sys.argv[1]), CheckpointConfig()) as checkpoints:
    step = checkpoints.latest() or 0
    template = {"x": jnp.asarray(noise)}
    if step:
        state, meta = checkpoints.restore(None, template, strict=True)
        assert meta["step"] == step and (np.asarray(state["x"]) == noise + np.uint32(step)).all()
    print("ready", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, {"x": jnp.asarray(noise + np.uint32(step))}, {})
"""


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_an_intact_checkpoint(tmp_path):
    rng = np.random.default_rng(1)
    reached = []
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVING), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        line = child.stdout.readline().split()
        assert line[:1] == ["ready"], "the checkpoint before the kill could not be restored"
        reached.append(int(line[1]))
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=rng.uniform(0.02, 0.4))
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert reached == sorted(reached) and reached[-1] > 0
    logging.getLogger(__name__).info("steps found at each start: %s", reached)
