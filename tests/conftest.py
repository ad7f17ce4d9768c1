"""Eight host devices, strict promotion, and shapes checked on every annotated call."""

from __future__ import annotations

import gc
import logging
import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Processes that tests start keep bytecode, as a user's do: without it, imports are mostly Python's own compiler.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # nothing is left in the user's folder
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of the time of these tests is the compiler's, on programs that run once.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
if version("jaxlib").startswith("0.10."):  # newer ones do not know the flag, and abort
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

from jaxtyping import install_import_hook

install_import_hook("ppojax", "beartype.beartype")

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", 0) and "PYTEST_XDIST_WORKER" not in os.environ:
        return  # its workers run the tests, and wait for it to be up
    import jax

    from ppojax.runtime import checkpoint  # noqa: F401
    from ppojax.trainer import build

    # absl, which logs while this is imported and later, gives a root logger without handlers the stderr of that moment.
    logging.root.handlers[:] = [logging.NullHandler()]
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Two processes run hundreds of programs each: what they free goes back to the system.
    build.keep_freed_memory = lambda: False


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest goes first: no worker is left alone with it at the end.
    items.sort(key=lambda item: "test_learning" not in item.nodeid)
    if "gpu" in config.getoption("-m") and "not gpu" not in config.getoption("-m"):
        import jax

        for item in items:
            if jax.default_backend() == "cpu" and item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none found"))
