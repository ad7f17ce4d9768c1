"""Bytes of any length go round in blocks of few sizes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ppojax.processes import exchange


@pytest.mark.parametrize("length", [0, 1, 4, 5, 16, 17, 60])
def test_parts_arrive_whole(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process gives the same."""
    sent: list[tuple[np.dtype, int]] = []

    def allgather(block: np.ndarray) -> np.ndarray:
        sent.append((block.dtype, len(block)))
        return np.stack([block, block])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(exchange, "process_allgather", allgather)
    monkeypatch.setattr(exchange, "BLOCKS", (4, 16))
    data = bytes(range(1, length + 1))
    assert exchange.gather(data) == [data, data]
    assert {dtype for dtype, _ in sent} == {np.dtype(np.uint8)}  # as numbers of jax, sizes would have 32 bits
    assert {width for _, width in sent} <= {exchange.SIZE, 4, 16} and len(sent) == 1 + max(1, -(-length // 16))
