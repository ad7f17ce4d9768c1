"""The Triton kernels, run by Triton's interpreter against float64; `test_triton` runs this file in its own process.

Triton reads TRITON_INTERPRET when it is imported. jax-triton cannot be imported without a CUDA plugin: what stands in
for it here calls the interpreter.
"""

from __future__ import annotations

import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cases import EVERY, STATISTICS, case, compare, exact, run
from ppojax.kernels import tiled
from ppojax.kernels.sweeps import XLA, Ask

TYPES = {"float32": "fp32", "bfloat16": "bf16", "int32": "i32"}
TIGHT = {"rtol": 2e-5, "atol": 2e-5}


class Tensor:
    """As much of a torch tensor as Triton's interpreter looks at."""

    def __init__(self, array):
        self.array, self.dtype = array, TYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self, *_, **__):
        return self

    def nothing(self, *_, **__):
        return None

    untyped_storage = new_empty = cpu
    storage_offset = size = stride = set_ = copy_ = nothing


def triton_call(*arrays, kernel, out_shape, grid, compute_capability, **constants):
    """What `jax_triton.triton_call` does, one program after the other; what no program writes stays NaN."""

    def interpret(*arrays):
        out = np.full(out_shape.shape, np.nan, out_shape.dtype)
        kernel[grid](*(Tensor(np.asarray(x)) for x in arrays), Tensor(out), **constants)
        return out

    return jax.pure_callback(interpret, out_shape, *arrays)


STAND_IN = ModuleType("jax_triton")
STAND_IN.triton_call = triton_call
sys.modules["jax_triton"] = STAND_IN

from ppojax.kernels.triton import SWEEPS  # noqa: E402


def function(sweeps):
    """`token_stats` by these passes."""

    def stats(hidden, head, target, *, reference=None, topk_id_NK=None, temperature=1.0, softcap=None, **asked):
        inputs = tiled.Inputs(hidden, head, target, *(reference or (None, None)), topk_id_NK)
        settings = {"temperature": temperature, "softcap": softcap, "sweeps": sweeps}
        return tiled.token_stats(inputs, ask=Ask(**asked), **settings)

    return stats


@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 17), (2, 5003)])
def test_values_and_gradients(rows, vocabulary):
    """Less than a piece; one piece and a part of one, or two and a part where there are two arrays of logits."""
    c = case(rows, vocabulary)
    found = run(function(SWEEPS), c, **EVERY)
    assert found.keys() == {*STATISTICS, "d_hidden", "d_head"}
    compare(found, exact(c), **TIGHT)


def test_temperature_and_softcap():
    c = case(2, 300, largest=6.0)
    found = run(function(SWEEPS), c, temperature=0.7, softcap=4.0, **EVERY)
    compare(found, exact(c, 0.7, 4.0), **TIGHT)


@pytest.mark.parametrize("asked", [{}, {"entropy": True}, {"kl": True}, {"reverse_kl": True}, {"tv": True}])
def test_only_what_is_asked_for(asked):
    c = case(2, 140)
    found = run(function(SWEEPS), c, topk_id_NK=None, **asked)
    assert found.keys() == {"logp", "d_hidden", "d_head", *asked}
    c["weights"] |= {n: 0 * w for n, w in c["weights"].items() if n not in found}
    compare(found, exact(c), **TIGHT)


def test_bfloat16():
    """The same statistics as XLA's passes make of the same logits, and gradients of the same type."""
    c = case(2, 300)
    c |= {name: jnp.asarray(c[name], jnp.bfloat16) for name in ("hidden", "head")}
    found, expected = run(function(SWEEPS), c, **EVERY), run(function(XLA), c, **EVERY)
    compare({name: found[name] for name in STATISTICS}, expected, **TIGHT)
    for name in ("d_hidden", "d_head"):
        assert found[name].dtype == jnp.bfloat16
        error = np.abs(np.asarray(found[name] - expected[name], np.float64)).max()
        assert error < 0.008 * np.abs(np.asarray(expected[name], np.float64)).max()


def test_no_rows():
    stats = function(SWEEPS)(jnp.zeros((0, 16)), jnp.ones((300, 16)), jnp.zeros(0, jnp.int32), entropy=True)
    assert stats.logp.shape == stats.entropy.shape == (0,)
