"""What processes tell each other on the host: a few bytes, or the rows that each has played."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

BLOCKS = (1 << 10, 1 << 16, 1 << 22)  # bytes that are sent at a time, each a program to compile
SIZE = 8  # bytes that say how many follow: jax has 32-bit numbers


def gather(data: bytes) -> Sequence[bytes]:
    """What every process gives, by its number; all have to call this in the same order."""
    if jax.process_count() == 1:
        return [data]
    sizes = [int.from_bytes(told, "little") for told in _block(len(data).to_bytes(SIZE, "little"), SIZE)]
    longest = max(*sizes, 1)
    width = next((block for block in BLOCKS if block >= longest), BLOCKS[-1])
    blocks = [_block(data[at : at + width], width) for at in range(0, longest, width)]
    return [b"".join(of_one)[:size] for *of_one, size in zip(*blocks, sizes, strict=True)]


def _block(data: bytes, width: int) -> Sequence[bytes]:
    """What every process gives, filled up to so many bytes."""
    return [row.tobytes() for row in process_allgather(np.frombuffer(data.ljust(width, b"\0"), np.uint8))]


def any_of(flag: bool) -> bool:
    """Whether it is true in some process."""
    return b"\1" in gather(b"\1" if flag else b"\0")
