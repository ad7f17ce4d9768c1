"""What processes tell each other on the host: a few bytes, or the rows that each has played."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

SMALLEST = 1024  # bytes; sizes are powers of two from here on, for each is a program to compile


def gather(data: bytes) -> Sequence[bytes]:
    """What every process gives, by its number; all have to call this in the same order."""
    if jax.process_count() == 1:
        return [data]
    sizes = process_allgather(np.array([len(data)], np.int32))[:, 0]
    width = max(SMALLEST, 1 << (int(sizes.max()) - 1).bit_length())
    padded = np.zeros(width, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return [row[:size].tobytes() for row, size in zip(process_allgather(padded), sizes, strict=True)]


def any_of(flag: bool) -> bool:
    """Whether it is true in some process."""
    return b"\1" in gather(b"\1" if flag else b"\0")
