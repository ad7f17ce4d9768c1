import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runtime_states import assert_same_bits, folders, make_mesh, make_state, save_steps, template_of

from ppojax.errors import DataError
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.settings import CheckpointConfig


def flip_byte(path: Path, at: float = 0.5):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x01
    path.write_bytes(bytes(data))


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
