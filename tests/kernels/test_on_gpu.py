"""The kernels on a GPU, at real vocabularies, against float64: `JAX_PLATFORMS=cuda pytest -m gpu tests/kernels`."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kernels.cases import EVERY, STATISTICS, case, compare, exact, run
from ppojax.kernels import tiled, token_stats
from ppojax.kernels.dispatch import choose
from ppojax.kernels.sweeps import Ask

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["pallas_gpu", "triton"])
def implementation(request):
    if request.param == "triton":
        pytest.importorskip("jax_triton", reason="jax-triton is not installed")
    with jax.default_matmul_precision("highest"):  # XLA's products would be TensorFloat32
        yield request.param


@pytest.mark.parametrize(("rows", "vocabulary"), [(40, 1000), (40, 32_771), (20, 49_152), (20, 151_936)])
def test_values_and_gradients(implementation, rows, vocabulary):
    """Three tiles, the last of which is padded."""

    def function(hidden, head, target, *, reference, topk_id_NK, **settings):
        inputs = tiled.Inputs(hidden, head, target, *reference, topk_id_NK)
        sweeps = choose(implementation, "gpu", vocabulary)
        return tiled.token_stats(inputs, sweeps=sweeps, rows_per_tile=rows // 3 + 1, **settings)

    c = case(rows, vocabulary, largest=6.0)
    found = run(function, c, ask=Ask(**EVERY), temperature=0.7, softcap=4.0)
    assert found.keys() == {*STATISTICS, "d_hidden", "d_head"}
    compare(found, exact(c, 0.7, 4.0), rtol=5e-5, atol=5e-5)


def test_kept_logits_of_80(implementation):
    c = case(7, 20_000, largest=80.0)
    compare(run(token_stats, c, implementation=implementation, **EVERY), exact(c), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("asked", [{}, {"entropy": True}, {"kl": True}, {"tv": True}])
def test_the_same_as_tiled(implementation, asked):
    """On the same bfloat16 inputs, up to the order of sums and the rounding of the gradient's terms."""
    c = case(100, 151_936)
    c |= {name: jax.numpy.asarray(c[name], "bfloat16") for name in ("hidden", "head")}
    found = run(token_stats, c, implementation=implementation, **asked)
    expected = run(token_stats, c, implementation="tiled", **asked)
    for name, value in found.items():
        error = np.abs(np.asarray(value, np.float64) - np.asarray(expected[name], np.float64)).max()
        tolerance = 0.008 if name.startswith("d_") else 2e-5
        assert error <= tolerance * np.abs(np.asarray(expected[name], np.float64)).max(), name
