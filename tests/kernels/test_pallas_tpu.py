"""The passes for TPUs: run by Pallas's interpreter against float64, and lowered for a TPU at real shapes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cases import EVERY, STATISTICS, case, compare, exact, run
from ppojax.kernels import sharded, tiled
from ppojax.kernels.pallas_tpu import BLOCK, SWEEPS, TPUSweeps, block_shape
from ppojax.kernels.sweeps import Ask
from ppojax.mesh import MeshConfig

SMALL = (16, 128)  # several blocks a row and a tile
TIGHT = {"rtol": 2e-5, "atol": 2e-5}


def stats(hidden, head, target, *, reference=None, topk_id_NK=None, temperature=1.0, softcap=None, **settings):
    """`token_stats` by these passes, in blocks and tiles of a given size."""
    rows_per_tile, mesh, block = (settings.pop(name, None) for name in ("rows_per_tile", "mesh", "block"))
    other, other_head = reference or (None, None)
    inputs = tiled.Inputs(hidden, head, target, other, other_head, topk_id_NK)
    settings = {"ask": Ask(**settings), "sweeps": TPUSweeps(True, block or BLOCK), "rows_per_tile": rows_per_tile}
    function = tiled.token_stats if mesh is None else functools.partial(sharded.token_stats, mesh=mesh)
    return function(inputs, temperature=temperature, softcap=softcap, **settings)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "block", "rows_per_tile"), [(1, 17, BLOCK, None), (7, 300, SMALL, 4), (40, 257, SMALL, None)]
)
def test_values_and_gradients(rows, vocabulary, block, rows_per_tile):
    """A block larger than all; two blocks and a part of words, with two tiles; blocks of rows with a part, too."""
    c = case(rows, vocabulary)
    found = run(stats, c, block=block, rows_per_tile=rows_per_tile, **EVERY)
    assert found.keys() == {*STATISTICS, "d_hidden", "d_head"}
    compare(found, exact(c), **TIGHT)


def test_a_maximum_in_the_last_block():
    """Logits that rise over the words to 80: what was summed before is scaled each time, to nothing at last."""
    c = case(3, 300, largest=1.0)
    c["head"][:, 0] += np.linspace(-80, 80, 300) / c["hidden"][:, :1].mean()
    compare(run(stats, c, block=SMALL, **EVERY), exact(c), rtol=1e-4, atol=2e-3)


def test_temperature_softcap_and_bfloat16():
    """The gradient of bfloat16 products is written in bfloat16, beside the float32 logits and not over them."""
    c = case(7, 257, largest=6.0)
    c |= {name: jnp.asarray(c[name], jnp.bfloat16) for name in ("hidden", "head")}
    settings = {"temperature": 0.7, "softcap": 4.0, "block": SMALL, "rows_per_tile": 7}
    found, expected = run(stats, c, **settings, **EVERY), exact(c, 0.7, 4.0)
    compare({name: found[name] for name in STATISTICS}, expected, **TIGHT)
    for name in ("d_hidden", "d_head"):
        assert found[name].dtype == jnp.bfloat16
        error = np.abs(np.asarray(found[name], np.float64) - expected[name]).max()
        assert error < 0.008 * np.abs(expected[name]).max()  # two roundings to 8 bits


@pytest.mark.parametrize("asked", [{}, {"entropy": True}, {"reverse_kl": True}])
def test_only_what_is_asked_for(asked):
    c = case(5, 140)
    found = run(stats, c, topk_id_NK=None, block=SMALL, **asked)
    assert found.keys() == {"logp", "d_hidden", "d_head", *asked}
    c["weights"] |= {name: 0 * w for name, w in c["weights"].items() if name not in found}
    compare(found, exact(c), **TIGHT)


def test_a_split_vocabulary():
    """140 words on each of two devices, and rows on four."""
    c, mesh = case(8, 280), MeshConfig(tensor=2, data=4).build()
    compare(run(stats, c, mesh=mesh, block=SMALL, **EVERY), exact(c), **TIGHT)


def test_no_rows():
    found = stats(jnp.zeros((0, 16)), jnp.ones((300, 16)), jnp.zeros(0, jnp.int32), entropy=True)
    assert found.logp.shape == found.entropy.shape == (0,)


def test_blocks():
    """Even shares of the rows, in whole tiles of bfloat16; few rows or words are one block."""
    shapes = {(1, 17): (1, 17), (216, 151_936): (112, 2048), (128, 4096): (128, 2048), (8192, 2048): (128, 2048)}
    for (rows, words), block in shapes.items():
        assert block_shape(rows, words, BLOCK) == block


V = 151_936


@pytest.mark.parametrize(("D", "mesh"), [(1536, None), (4096, None), (2048, MeshConfig(tensor=4, data=2))], ids=str)
def test_lowering_at_real_shapes(D, mesh):
    """8192 tokens: forward and backward become TPU kernels, a part of the vocabulary's too."""
    mesh = mesh and mesh.build()

    def objective(hidden, head, target, other, other_head):
        inputs = tiled.Inputs(hidden, head, target, other, other_head)
        settings = {"temperature": 0.7, "softcap": None, "ask": Ask(**EVERY), "sweeps": SWEEPS}
        if mesh is None:
            return sum(x.sum() for x in tiled.token_stats(inputs, **settings) if x is not None)
        return sum(x.sum() for x in sharded.token_stats(inputs, mesh=mesh, **settings) if x is not None)

    pair = jax.ShapeDtypeStruct((8192, D), jnp.bfloat16), jax.ShapeDtypeStruct((V, D), jnp.bfloat16)
    arguments = (*pair, jax.ShapeDtypeStruct((8192,), jnp.int32), *pair)
    lowered = jax.jit(jax.grad(objective, (0, 1))).trace(*arguments).lower(lowering_platforms=("tpu",))
    # mass of both and the gaps in the forward; the gradient in the backward.
    assert lowered.as_text().count("@tpu_custom_call") == 4
