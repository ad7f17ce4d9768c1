"""Meshes: devices asked for, dimensions divided, and where arrays lie."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from helpers import ACTOR, CRITIC, params, random_experience
from ppojax.errors import ConfigError
from ppojax.mesh import AXES, MeshConfig, replicated, shard_rows, sharding
from ppojax.models.forward import ModelDef, param_shardings
from ppojax.update.settings import CriticConfig, OptimizerConfig
from ppojax.update.state import init_state


def test_a_mesh_takes_the_first_devices() -> None:
    mesh = MeshConfig(data=2, fsdp=2, tensor=1).build()
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 1} and tuple(mesh.axis_names) == AXES
    assert list(mesh.devices.flat) == jax.devices()[:4]


def test_too_many_devices_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        MeshConfig(data=4, fsdp=2, tensor=2).build()
    assert str(caught.value) == (
        "mesh 4x2x1x2 (data x fsdp x expert x tensor) needs 16 devices, 8 found: "
        "make the product of mesh.data, mesh.fsdp, mesh.expert and mesh.tensor at most 8"
    )


def test_each_dimension_that_does_not_divide_is_named() -> None:
    faults = MeshConfig(fsdp=3, tensor=4).check_divides({"embed": 32, "heads": 6, "ffn": 64, "vocab": 48})
    assert faults == [
        "mesh.fsdp = 3 does not divide embed = 32; legal: 1, 2, 4, 8, 16, 32",
        "mesh.tensor = 4 does not divide heads = 6; legal: 1, 2, 3, 6",
    ]
    assert MeshConfig(data=3).check_divides({"embed": 32, "heads": 4}) == []
    assert (
        MeshConfig(data=3, fsdp=2)
        .check_divides({"rows": 8})[0]
        .startswith("mesh.data x mesh.fsdp x mesh.expert = 6 does not divide rows = 8")
    )


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, expert=2)])
def test_rows_are_split_over_data_fsdp_and_expert(mesh: MeshConfig) -> None:
    assert mesh.row_shards == 4
    experience, _ = random_experience(mesh=mesh)
    for path, x in jax.tree_util.tree_leaves_with_path(experience):
        assert len({str(shard.index[0]) for shard in x.addressable_shards}) == mesh.row_shards, path
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, jax.device_get(x)[shard.index])
    value_MBT = shard_rows(np.zeros((1, 8, 4), np.float32), mesh.build(), axis=1)
    assert value_MBT.sharding.shard_shape(value_MBT.shape) == (1, 2, 4)
    assert shard_rows(np.float32(3), mesh.build()).sharding.is_fully_replicated


def test_axes_without_a_rule_are_whole() -> None:
    mesh = MeshConfig(data=2, tensor=2).build()
    assert sharding(mesh, (None, "vocab")).shard_shape((6, 8)) == (6, 4)
    assert replicated(mesh).shard_shape((6, 8)) == (6, 8)


@pytest.mark.parametrize("model", [ACTOR, CRITIC], ids=["actor", "critic"])
def test_every_matrix_is_split_over_fsdp_and_tensor(model: ModelDef) -> None:
    """Each device holds a quarter of each matrix, of its moments too; norms and the value head are whole."""
    mesh = MeshConfig(fsdp=2, tensor=2).build()
    given = params(model)
    optimizer = CriticConfig().build_optimizer() if model.head is not None else OptimizerConfig().build()
    state = init_state(model, given, optimizer, mesh)
    whole = {"attn_norm", "mlp_norm", "norm", "value_head"}

    def check(path: tuple, x: jax.Array) -> None:
        name = next((str(p.key) for p in reversed(path) if isinstance(p, jax.tree_util.DictKey)), "")
        parts = 1 if name in whole or x.ndim == 0 else 4
        assert x.addressable_shards[0].data.size * parts == x.size, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, state.params)
    jax.tree_util.tree_map_with_path(check, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, state.params, given)
    assert jax.tree.structure(param_shardings(model, mesh)) == jax.tree.structure(state.params)


def test_a_state_may_take_over_the_weights() -> None:
    mesh = MeshConfig(fsdp=2).build()
    given = jax.device_put(params(ACTOR), param_shardings(ACTOR, mesh))
    kept = jax.tree.map(np.array, given)
    state = init_state(ACTOR, given, OptimizerConfig().build(), mesh, donate=True)
    jax.tree.map(np.testing.assert_array_equal, state.params, kept)
    assert all(p.is_deleted() for p in jax.tree.leaves(given))
