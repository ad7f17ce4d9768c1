import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppojax.errors import CannotWriteError, DataError
from ppojax.runtime.atomic import write_atomic
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.settings import CheckpointConfig
from ppojax.types import TrainState


def make_mesh(data: int, tensor: int) -> Mesh:
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"))


def make_state(mesh: Mesh, seed: int = 0, width: int = 16):
    """A state as training has it: matrices sharded, moments beside them, counters and a key on every device."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": rng.normal(size=(24, width)).astype(np.float32),
        "layers": {"q": rng.normal(size=(2, width, 8)).astype(np.float32)},
    }
    specs = {"embed": PartitionSpec("tensor", "data"), "layers": {"q": PartitionSpec(None, "data", "tensor")}}
    params = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = TrainState(params, optax.adamw(1e-3).init(params), jnp.int32(seed), jnp.zeros(2, jnp.int32))
    state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, everywhere) if len(leaf.sharding.device_set) == 1 else leaf, state
    )
    return {
        "actor": state,
        "half": jax.device_put(jnp.asarray(rng.normal(size=7), jnp.bfloat16), everywhere),
        "key": jax.device_put(jax.random.key_data(jax.random.key(seed)), everywhere),
        "nan": jax.device_put(jnp.array([jnp.nan, -0.0, jnp.inf], jnp.float32), everywhere),
    }


def template_of(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(folder: Path, steps, config=None, **kwargs):
    states = {step: make_state(make_mesh(4, 2), step, **kwargs) for step in steps}
    with Checkpoints(folder, config or CheckpointConfig()) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"cursor": step * 10})
    return states


def flip_byte(path: Path, at: float = 0.5):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x01
    path.write_bytes(bytes(data))


def folders(directory: Path):
    return sorted(entry.name for entry in directory.iterdir())


def test_a_sharded_state_comes_back_bit_for_bit_onto_its_shardings(tmp_path):
    state = save_steps(tmp_path, [3])[3]
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, meta = checkpoints.restore(None, template_of(state))
    assert_same_bits(restored, state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.sharding == b.sharding
    assert meta == {"cursor": 30, "step": 3}


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (8, 1)])
def test_a_state_comes_back_onto_another_mesh(tmp_path, shape):
    state = save_steps(tmp_path, [1])[1]
    other = make_state(make_mesh(*shape), seed=9)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, _ = checkpoints.restore(None, other)
    assert_same_bits(restored, state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(other), strict=True):
        assert a.sharding == b.sharding


def test_a_restored_state_takes_a_jitted_step_with_scalars_and_shards_together(tmp_path):
    state = save_steps(tmp_path, [1])[1]
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, _ = checkpoints.restore(1, template_of(state))
    out = jax.jit(lambda s: s["actor"].params["embed"].sum() + s["actor"].step.astype("float32"))(restored)
    assert np.isfinite(out)


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    sharding = NamedSharding(make_mesh(4, 2), PartitionSpec("data"))
    state = {
        "sharded": jax.device_put(jnp.zeros((2048, 1024)), sharding),
        "single": jnp.zeros((1024, 1024)),
    }
    template = template_of(state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + 1.0, s), donate_argnums=0)
    with Checkpoints(tmp_path, CheckpointConfig(verify=False)) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        restored, _ = checkpoints.restore(1, template)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(restored))


def test_no_save_is_skipped_while_another_runs(tmp_path):
    save_steps(tmp_path, range(1, 6), CheckpointConfig(keep=10))
    assert folders(tmp_path) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(tmp_path, keep):
    save_steps(tmp_path, [2, 4, 10, 12], CheckpointConfig(keep=keep))
    assert sorted(map(int, folders(tmp_path))) == [2, 4, 10, 12][-keep:]


def test_block_means_that_it_is_on_the_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(5, {"x": jnp.ones(3)}, {}, block=True)
    assert folders(tmp_path) == ["5"] and checkpoints.latest() == 5
    checkpoints.close()


def test_saving_a_step_again_is_not_an_error(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(5, {"x": jnp.ones(3)}, {})
        checkpoints.save(5, {"x": jnp.ones(3)}, {}, block=True)
    assert folders(tmp_path) == ["5"]


def test_when_a_checkpoint_is_due():
    assert [step for step in range(1, 10) if CheckpointConfig(every=4).due(step)] == [4, 8]
    assert not any(CheckpointConfig(every=0).due(step) for step in range(10))


# Damage


def damaged_files():
    """Name every file of a checkpoint, without the random names that orbax gives."""
    return ["meta.json", "manifest.json", "state/_METADATA", "state/_sharding", "state/manifest.ocdbt", "data"]


def find_file(folder: Path, name: str) -> Path:
    if name != "data":
        return folder / name
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("name", damaged_files())
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, name, harm):
    states = save_steps(tmp_path, [1, 2], width=64)
    path = find_file(tmp_path / "2", name)
    if harm == "flip":
        flip_byte(path)
    elif harm == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with pytest.raises(DataError, match=r"2: the checkpoint is damaged: .*; remove the folder, or use resume=true"):
            checkpoints.restore(None, template_of(states[2]), strict=True)
        restored, meta = checkpoints.restore(None, template_of(states[1]))
        assert checkpoints.latest() == 1
    assert_same_bits(restored, states[1])
    assert meta["step"] == 1
    assert "the checkpoint is damaged" in caplog.text and "trying the one before" in caplog.text


def test_every_byte_counts(tmp_path):
    """Flip bits at places drawn over all files: not one goes unseen."""
    states = save_steps(tmp_path / "a", [1, 2])
    rng = np.random.default_rng(0)
    files = [path for path in (tmp_path / "a" / "2").rglob("*") if path.is_file() and path.stat().st_size]
    with Checkpoints(tmp_path / "a", CheckpointConfig()) as checkpoints:
        for path in files:
            original = path.read_bytes()
            flip_byte(path, rng.random())
            assert checkpoints.restore(None, template_of(states[1]))[1]["step"] == 1, path
            path.write_bytes(original)
            assert checkpoints.restore(None, template_of(states[1]))[1]["step"] == 2, path


def test_a_given_step_is_not_replaced_by_another(tmp_path):
    states = save_steps(tmp_path, [1, 2])
    flip_byte(find_file(tmp_path / "2", "data"))
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(DataError, match="fails its sha256"),
    ):
        checkpoints.restore(2, template_of(states[2]))


def test_a_step_that_is_not_there(tmp_path):
    states = save_steps(tmp_path, [1])
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(DataError, match=r"7: the checkpoint is damaged: manifest.json cannot be read"),
    ):
        checkpoints.restore(7, template_of(states[1]))


def test_no_checkpoint_at_all(tmp_path):
    with Checkpoints(tmp_path / "none", CheckpointConfig()) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(DataError, match="there is no intact checkpoint; start without resume"):
            checkpoints.restore(None, {"x": jnp.ones(3)})
    assert not (tmp_path / "none").exists()


def test_after_a_fallback_the_run_goes_on_and_the_damaged_step_is_set_aside(tmp_path):
    states = save_steps(tmp_path, [1, 2])
    flip_byte(find_file(tmp_path / "2", "data"))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.restore(None, template_of(states[1]))
        assert folders(tmp_path) == ["1", "2"]  # restoring only reads
        checkpoints.save(2, states[2], {"cursor": 20})
    assert folders(tmp_path) == ["1", "2", "2.aside"]
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, _ = checkpoints.restore(None, template_of(states[2]), strict=True)
    assert_same_bits(restored, states[2])


def test_steps_after_the_one_resumed_from_do_not_mix_with_the_new_ones(tmp_path):
    states = save_steps(tmp_path, [1, 2, 3], CheckpointConfig(keep=3))
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        checkpoints.restore(1, template_of(states[1]))
        checkpoints.save(2, states[3], {}, block=True)
        assert checkpoints.latest() == 2
    assert folders(tmp_path) == ["1", "2", "2.aside", "3.aside"]


# Another model


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: {**s, "half": s["half"][:5]}, r"half is bfloat16\[7\] in the checkpoint and bfloat16\[5\] in this"),
        (lambda s: {**s, "half": s["half"].astype("float32")}, r"half is bfloat16\[7\] .* float32\[7\] in this run"),
        (lambda s: {**s, "critic": s["half"]}, r"critic is absent in the checkpoint and bfloat16\[7\] in this run"),
        (lambda s: {"actor": s["actor"]}, r"half is bfloat16\[7\] .* absent in this run \(and 2 more\); resume with"),
    ],
)
def test_a_state_of_another_make_is_refused_by_name(tmp_path, change, text):
    state = save_steps(tmp_path, [1, 2])[2]
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(DataError, match=text):
        checkpoints.restore(None, change(state))


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path):
    from ppojax.runtime import manifest

    state = save_steps(tmp_path, [1])[1]
    body = {**manifest.read_manifest(tmp_path / "1"), "format": 2}
    (tmp_path / "1" / "manifest.json").write_text(json.dumps({"sha256": manifest._body_sha256(body), "body": body}))
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(DataError, match="checkpoint format 2, this ppojax reads format 1"),
    ):
        checkpoints.restore(None, state)


# Interruption and full disks


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


def test_a_refused_save_is_a_warning_while_an_older_one_stands(tmp_path, caplog, capfd):
    state = big_state()
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
