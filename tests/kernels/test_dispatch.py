"""Which passes are chosen, and what is said where the ones asked for cannot be had."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.kernels import dispatch, token_stats
from ppojax.kernels.dispatch import choose, platform_of
from ppojax.kernels.pallas_gpu import SWEEPS
from ppojax.kernels.sweeps import XLA, XLASweeps
from ppojax.mesh import MeshConfig

ARRAYS = jnp.ones((3, 16)), jnp.ones((17, 16)), jnp.zeros(3, jnp.int32)


def test_xla_is_the_default_everywhere():
    for platform in ("cpu", "gpu", "tpu"):
        assert choose(None, platform, 17) is choose("tiled", platform, 17) is XLA


def test_the_kernels_of_a_platform():
    assert choose("pallas_gpu", "gpu", 151_936) is SWEEPS


@pytest.mark.parametrize(("name", "needed"), [("pallas_gpu", "gpu"), ("triton", "gpu"), ("pallas_tpu", "tpu")])
def test_an_implementation_of_another_platform(name, needed):
    text = f"implementation='{name}' runs on {needed}, and these arrays are on cpu: leave it out, or give 'tiled'"
    with pytest.raises(ValueError, match=text):
        token_stats(*ARRAYS, implementation=name)


def test_an_implementation_that_nobody_wrote():
    with pytest.raises(ValueError, match="no implementation 'cuda': give one of reference, tiled, pallas_gpu, "):
        choose("cuda", "gpu", 17)


def test_a_refused_vocabulary_is_said_once():
    dispatch._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"pallas_gpu takes no vocabulary of less than 128 words \(17\); 'tiled'"):
        assert choose("pallas_gpu", "gpu", 17) is XLA
    with warnings.catch_warnings(action="error"):
        assert choose("pallas_gpu", "gpu", 17) is XLA


@dataclass(frozen=True)
class Picky:
    """A module of passes that refuse a vocabulary of so many words."""

    refused: int

    @property
    def SWEEPS(self):
        outer = self

        class Sweeps(XLASweeps):
            def refusal(self, vocabulary):
                return "has a reason" if vocabulary == outer.refused else None

        return Sweeps()


@pytest.mark.parametrize(("axes", "refused"), [(None, 16), ({"tensor": 8}, 2)])
def test_refusal_is_of_a_devices_share_and_changes_no_number(monkeypatch, axes, refused):
    """16 words on one device; 2 on each of eight."""
    dispatch._say_once.cache_clear()
    monkeypatch.setattr(dispatch, "_PLATFORM", {"pallas_gpu": "cpu"})
    monkeypatch.setattr(dispatch, "import_module", lambda name: Picky(refused))
    hidden, head = (jax.random.normal(jax.random.key(i), (n, 16)) for i, n in enumerate((8, 16)))
    arguments = (hidden, head, jnp.zeros(8, jnp.int32))
    mesh = None if axes is None else MeshConfig(**axes).build()
    with pytest.warns(RuntimeWarning, match="token_stats: pallas_gpu has a reason; 'tiled' is used instead"):
        found = token_stats(*arguments, implementation="pallas_gpu", mesh=mesh)
    np.testing.assert_allclose(found.logp, token_stats(*arguments).logp, rtol=1e-6)


def test_where_arrays_are():
    assert platform_of(None) == platform_of(MeshConfig().build()) == "cpu"
