"""Token statistics with the vocabulary and the rows split over a mesh of 8 devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cases import EVERY, STATISTICS, case, compare, exact, run
from ppojax.kernels import sharded, token_stats
from ppojax.kernels.sweeps import Ask
from ppojax.kernels.tiled import Inputs
from ppojax.mesh import MeshConfig

MESHES = [{"tensor": 8}, {"tensor": 2, "data": 2, "fsdp": 2}, {"tensor": 4, "expert": 2}, {"data": 8}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("rows", [7, 64])
def test_a_mesh_changes_nothing(axes, rows):
    """Also where rows do not divide, and where a device has no word that a row names."""
    c, mesh = case(rows, 40), MeshConfig(**axes).build()
    found = run(token_stats, c, mesh=mesh, **EVERY)
    assert found.keys() == {*STATISTICS, "d_hidden", "d_head"}
    compare(found, exact(c), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows_per_tile", [3, 32])
def test_tiles_on_a_mesh(rows_per_tile):
    c, mesh = case(64, 40, largest=6.0), MeshConfig(tensor=4, data=2).build()

    def function(hidden, head, target, *, reference, topk_id_NK, **settings):
        inputs = Inputs(hidden, head, target, *reference, topk_id_NK)
        return sharded.token_stats(inputs, mesh=mesh, rows_per_tile=rows_per_tile, **settings)

    found = run(function, c, ask=Ask(**EVERY), temperature=0.7, softcap=4.0)
    compare(found, exact(c, 0.7, 4.0), rtol=2e-5, atol=2e-5)


def test_a_device_never_holds_other_words():
    """The largest array of the compiled program is a device's share of the logits, 16 x 1000, not a whole row's."""
    mesh = MeshConfig(tensor=8).build()
    shapes = [((16, 32), jnp.float32), ((8000, 32), jnp.float32), ((16,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

    def total(hidden, head, target):
        stats = token_stats(hidden, head, target, entropy=True, mesh=mesh)
        return stats.logp.sum() + stats.entropy.sum()

    words = jax.NamedSharding(mesh, jax.P("tensor", None))
    compiled = jax.jit(jax.grad(total, (0, 1)), in_shardings=(None, words, None)).lower(*arguments).compile()
    text = compiled.as_text()
    assert "f32[16,1000]" in text
    assert "f32[16,8000]" not in text and "f32[8000,32]" not in text


def test_a_vocabulary_that_does_not_divide():
    c = case(8, 41)
    with pytest.raises(ValueError, match=r"mesh.tensor = 8 does not divide V = 41"):
        token_stats(*(jnp.asarray(c[n]) for n in ("hidden", "head", "target")), mesh=MeshConfig(tensor=8).build())


def test_near_certain_rows_agree_over_parts():
    """p = 1 on one device's word: the others' parts of every sum are 0, and nothing is NaN."""
    hidden, head = np.eye(2, 16, dtype=np.float32) * 100, np.eye(16, 16, dtype=np.float32)
    c = case(2, 16) | {"hidden": hidden, "head": head, "other": hidden[:, :12], "other_head": head[:, :12]}
    found = run(token_stats, c, mesh=MeshConfig(tensor=8).build(), **EVERY)
    assert all(np.isfinite(x).all() for x in found.values())
    np.testing.assert_array_equal(found["tv"], 0.0)
