"""Eight host devices, strict promotion, and shapes checked on every annotated call."""

from __future__ import annotations

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Processes that tests start keep bytecode, as a user's do: without it, imports are mostly Python's own compiler.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # nothing is left in the user's folder
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of the time of these tests is the compiler's, on programs that run once.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # newer ones do not know the flag, and abort
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

from jaxtyping import install_import_hook

install_import_hook("ppojax", "beartype.beartype")

import jax
import pytest

from ppojax.trainer import build

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Two processes run hundreds of programs each: what they free goes back to the system.
build.keep_freed_memory = lambda: False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest goes first: no worker is left alone with it at the end.
    items.sort(key=lambda item: "test_learning" not in item.nodeid)
    if "gpu" in config.getoption("-m") and "not gpu" not in config.getoption("-m") and jax.default_backend() == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none found"))
