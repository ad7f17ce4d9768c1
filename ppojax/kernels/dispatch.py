"""Which code makes the passes over the logits: chosen by name, on the platform it was written for."""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib import import_module
from typing import Literal, get_args

import jax

from ppojax.kernels.sweeps import XLA, Sweeps

Implementation = Literal["reference", "tiled", "pallas_gpu", "pallas_tpu", "triton"]

_PLATFORM = {"pallas_gpu": "gpu", "pallas_tpu": "tpu", "triton": "gpu"}


def platform_of(mesh: jax.sharding.Mesh | None) -> str:
    """Where the arrays are: `cpu`, `gpu` or `tpu`."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def choose(implementation: str | None, platform: str, vocabulary: int) -> Sweeps:
    """Find the passes of an implementation; for a part of the vocabulary that it cannot take, XLA's, with a warning.

    Raises:
        ValueError: there is no such implementation, or it was not written for this platform.
        ConfigError: it needs a package that is not installed.
    """
    if implementation in (None, "tiled"):
        return XLA
    if implementation not in _PLATFORM:
        known = ", ".join(name for name in get_args(Implementation))
        raise ValueError(f"token_stats: there is no implementation {implementation!r}: give one of {known}")
    needed = _PLATFORM[implementation]
    if platform != needed:
        raise ValueError(
            f"token_stats: implementation={implementation!r} runs on {needed}, and these arrays are on {platform}: "
            f"leave it out, or give 'tiled'"
        )
    sweeps: Sweeps = import_module(f"ppojax.kernels.{implementation}").SWEEPS
    reason = sweeps.refusal(vocabulary)
    if reason is None:
        return sweeps
    _say_once(f"token_stats: {implementation} {reason}; 'tiled' is used instead")
    return XLA


@lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
