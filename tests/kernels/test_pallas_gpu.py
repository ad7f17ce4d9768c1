"""The Mosaic GPU kernels: run by Pallas's GPU interpreter against float64, and lowered for CUDA at real shapes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.cases import EVERY, STATISTICS, case, compare, exact, run
from ppojax.kernels import sharded, tiled
from ppojax.kernels.pallas_gpu import SWEEPS, MosaicSweeps
from ppojax.kernels.sweeps import XLA, Ask
from ppojax.mesh import MeshConfig

TIGHT = {"rtol": 2e-5, "atol": 2e-5}
CAN_INTERPRET = "InterpretGPUParams" in vars(plgpu)
interpreted = pytest.mark.skipif(not CAN_INTERPRET, reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU")


def function(hidden, head, target, *, reference=None, topk_id_NK=None, sweeps=None, mesh=None, rows=None, **settings):
    """`token_stats` by these passes: interpreted, unless others are given."""
    sweeps = MosaicSweeps(plgpu.InterpretGPUParams()) if sweeps is None else sweeps
    inputs = tiled.Inputs(hidden, head, target, *(reference or (None, None)), topk_id_NK)
    places = {"temperature": settings.pop("temperature", 1.0), "softcap": settings.pop("softcap", None)}
    stats = tiled.token_stats if mesh is None else partial(sharded.token_stats, mesh=mesh)
    return stats(inputs, ask=Ask(**settings), sweeps=sweeps, rows_per_tile=rows, **places)


@interpreted
@pytest.mark.parametrize(
    ("rows", "vocabulary", "per_tile"), [(1, 128, None), (5, 1000, 2), (2, 4100, None), (1, 32_771, None)]
)
def test_values_and_gradients(rows, vocabulary, per_tile):
    """One piece of one word a thread; two that overlap, in tiles; 16-byte loads; an odd row, words one by one."""
    c = case(rows, vocabulary)
    found = run(function, c, rows=per_tile, **EVERY)
    assert found.keys() == {*STATISTICS, "d_hidden", "d_head"}
    compare(found, exact(c), rtol=5e-5, atol=5e-5)


@interpreted
def test_temperature_softcap_and_logits_of_80():
    c = case(2, 700, largest=80.0)
    compare(run(function, c, temperature=0.7, softcap=30.0, **EVERY), exact(c, 0.7, 30.0), rtol=1e-4, atol=2e-3)


@interpreted
@pytest.mark.parametrize("asked", [{}, {"entropy": True}, {"kl": True}, {"reverse_kl": True, "tv": True}])
def test_only_what_is_asked_for(asked):
    c = case(3, 300)
    found = run(function, c, topk_id_NK=None, **asked)
    assert found.keys() == {"logp", "d_hidden", "d_head", *asked}
    c["weights"] |= {n: 0 * w for n, w in c["weights"].items() if n not in found}
    compare(found, exact(c), **TIGHT)


@interpreted
def test_bfloat16():
    """The same statistics as XLA's passes make of the same logits, and gradients of the same type."""
    c = case(4, 520)
    c |= {name: jnp.asarray(c[name], jnp.bfloat16) for name in ("hidden", "head")}
    found, expected = run(function, c, **EVERY), run(function, c, sweeps=XLA, **EVERY)
    compare({name: found[name] for name in STATISTICS}, expected, **TIGHT)
    for name in ("d_hidden", "d_head"):
        assert found[name].dtype == jnp.bfloat16
        error = np.abs(np.asarray(found[name] - expected[name], np.float64)).max()
        assert error < 0.008 * np.abs(np.asarray(expected[name], np.float64)).max()


@interpreted
def test_a_split_vocabulary():
    """Each of two devices has 150 of the words."""
    c, mesh = case(3, 300), MeshConfig(tensor=2, data=4).build()
    compare(run(function, c, mesh=mesh, **EVERY), exact(c), **TIGHT)


def test_no_rows():
    stats = function(jnp.zeros((0, 16)), jnp.ones((300, 16)), jnp.zeros(0, jnp.int32), sweeps=SWEEPS, entropy=True)
    assert stats.logp.shape == stats.entropy.shape == (0,)


def test_what_is_refused():
    assert SWEEPS.refusal(127) == "takes no vocabulary of less than 128 words (127)"
    assert SWEEPS.refusal(128) is None and SWEEPS.refusal(151_936) is None


def test_passes_of_two_kinds_are_not_the_same_to_a_compiler_cache():
    assert len({SWEEPS, XLA, MosaicSweeps(interpret=True)}) == 3


def kernels(width, vocabulary, mesh=None, **settings) -> int:
    """Lower forward and backward at 8192 rows for CUDA, and count the kernels' calls."""

    def total(hidden, head, target, other, other_head):
        reference = (other, other_head) if Ask(**settings).reference else None
        stats = function(hidden, head, target, reference=reference, sweeps=SWEEPS, mesh=mesh, **settings)
        return sum((x.sum() for x in stats if x is not None), jnp.float32(0))

    policy = [jax.ShapeDtypeStruct((n, width), jnp.bfloat16) for n in (8192, vocabulary)]
    shapes = (*policy, jax.ShapeDtypeStruct((8192,), jnp.int32), *policy)
    traced = jax.jit(jax.grad(total, (0, 1))).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.parametrize("vocabulary", [49_152, 151_936, 32_771])
def test_lowers_for_cuda(vocabulary):
    """A pass over the policy's logits, one over the reference's, one over both, and one for the gradient."""
    assert kernels(1536, vocabulary, **EVERY) == 4


def test_lowers_for_cuda_at_the_largest_width():
    assert kernels(4096, 151_936) == 2


def test_lowers_for_cuda_in_parts():
    assert kernels(1536, 151_936, mesh=MeshConfig(tensor=8).build(), **EVERY) == 4
