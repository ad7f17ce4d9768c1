"""The tiny checkpoints of tests/data/families: their folders, and what transformers computes with them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from ppojax.models.forward import Params
from ppojax.models.hf import HFFolder, open_hf
from ppojax.models.spec import DecoderSpec

DATA = Path(__file__).parent / "data/families"
RECORD = json.loads((DATA / "cases.json").read_text())
CASES = tuple(RECORD["cases"])
WITH_GRADIENTS = tuple(name for name, case in RECORD["cases"].items() if case["gradients"])
PREFIX: int = RECORD["prefix"]  # tokens that the two rows share


@cache
def opened(case: str) -> HFFolder:
    return open_hf(DATA / case)


@cache
def checkpoint(case: str) -> tuple[DecoderSpec, Params]:
    """The spec and the float32 parameters."""
    return opened(case).spec, opened(case).read()


@cache
def oracle(case: str) -> dict[str, np.ndarray]:
    with np.load(DATA / case / "oracle.npz") as file:
        return dict(file)
