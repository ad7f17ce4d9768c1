"""States like those of training, saved in steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def folders(directory: Path):
    return sorted(entry.name for entry in directory.iterdir())
