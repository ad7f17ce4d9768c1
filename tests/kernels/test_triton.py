"""The Triton kernels, where triton is installed: interpreted against float64, and compiled for an H200."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ppojax.errors import ConfigError
from ppojax.kernels.dispatch import choose

MODULES = ("ppojax.kernels.triton", "ppojax.kernels.triton_kernels")


def triton_or_skip():
    return pytest.importorskip("triton", reason="triton is not installed")


def test_interpreted():
    triton_or_skip()
    script = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(script)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("vocabulary", [151_936, 32_771])
def test_kernels_compile_to_cubins(monkeypatch, tmp_path, vocabulary):
    """For compute capability 9.0, all statistics and none, gradients in float32 and bfloat16."""
    triton = triton_or_skip()
    compiler, backend = (importlib.import_module(f"triton.{name}") for name in ("compiler", "backends.compiler"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, triton 3.9 warns; jax-triton sets it
    kernels = importlib.import_module(MODULES[1])
    types = {f"{n}_ptr": "*fp32" for n in ("z", "y", "numbers", "sums")} | {"place_ptr": "*i32"}

    def cubin(kernel, words, **constants):
        pieces = -(-vocabulary // words)
        constants |= {"VOCABULARY": vocabulary, "PIECES": pieces, "WORDS": words}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        return triton.compile(source, target=backend.GPUTarget("cuda", 90, 32)).asm["cubin"]

    for flag in (False, True):
        types["d_ptr"] = "*bf16" if flag else "*fp32"
        line = dict.fromkeys(("REFERENCE", "ENTROPY", "KL", "TV", "REVERSE_KL"), flag)
        slope = {"PER_TEMPERATURE": 1.25, "PER_CAP": 0.02 * flag}
        asked = dict.fromkeys(("KL", "REVERSE_KL", "TV"), flag)
        assert cubin(kernels.mass, 4096, SUMS=4, WEIGHTED=flag)
        assert cubin(kernels.gaps, 2048, SUMS=4, NUMBERS=10, **asked)
        assert cubin(kernels.gradient, 2048 if flag else 4096, NUMBERS=10, **line, **slope)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    for module in MODULES:
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ConfigError, match=r"implementation='triton' needs the extra ppojax\[triton\] \(.*jax_triton"):
        choose("triton", "gpu", 17)
