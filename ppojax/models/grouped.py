"""Grouped matrix product: rows sorted by group, each group with its own matrix."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Method = Literal["ragged", "blocks"]
BLOCK = 32  # rows that `blocks` takes at a time


def grouped(x_MD: jax.Array, w_EDF: jax.Array, size_E: jax.Array, method: Method) -> jax.Array:
    """y_m = x_m w_e(m): the first size_0 rows meet w_0, the next size_1 rows w_1, and so on.

    Rows behind the last group give zero, and get no gradient. Two ways to the same numbers:

    ragged  `jax.lax.ragged_dot`: a grouped product where XLA has one (TPU, GPU), but on CPU every row meets every
            matrix and E - 1 of E products are thrown away.
    blocks  a loop over blocks of 32 rows of one group: at most 31 rows a group are computed in vain, and a matrix
            is read again for each block.
    """
    product = jax.lax.ragged_dot if method == "ragged" else _by_blocks
    inside_M = jnp.arange(x_MD.shape[0], dtype=jnp.int32) < jnp.sum(size_E)
    # What either leaves behind the last group is not said.
    return jnp.where(inside_M[:, None], product(x_MD, w_EDF, size_E), jnp.zeros((), x_MD.dtype))


def default_method(mesh: jax.sharding.Mesh | None = None) -> Method:
    """`blocks` on CPU, where it was measured 4 to 28 times faster (docs/log.md); elsewhere the compiler's own."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "blocks" if platform == "cpu" else "ragged"


@jax.custom_vjp
def _by_blocks(x_MD: jax.Array, w_EDF: jax.Array, size_E: jax.Array) -> jax.Array:
    block = _Blocks(size_E)
    x_MD, M = _padded(x_MD), x_MD.shape[0]

    def step(i: jax.Array, y_MF: jax.Array) -> jax.Array:
        expert, row, _ = block(i)
        # What lies behind a group's end is overwritten when the next group's turn comes.
        return _put(y_MF, _rows(x_MD, row) @ w_EDF[expert], row)

    start = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), x_MD.dtype)
    return jax.lax.fori_loop(0, block.count, step, start)[:M]


def _forward(x_MD: jax.Array, w_EDF: jax.Array, size_E: jax.Array) -> tuple[jax.Array, tuple]:
    return _by_blocks(x_MD, w_EDF, size_E), (x_MD, w_EDF, size_E)


def _backward(saved: tuple, dy_MF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MD, w_EDF, size_E = saved
    block = _Blocks(size_E)
    M, x_MD, dy_MF = x_MD.shape[0], _padded(x_MD), _padded(dy_MF)

    def step(i: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx_MD, dw_EDF = grads
        expert, row, rest = block(i)
        dy = _rows(dy_MF, row)
        dx_MD = _put(dx_MD, dy @ w_EDF[expert].T, row)
        own = jnp.arange(BLOCK, dtype=jnp.int32)[:, None] < rest
        dw = jnp.where(own, _rows(x_MD, row), jnp.zeros((), x_MD.dtype)).T @ dy
        return dx_MD, dw_EDF.at[expert].add(dw)

    grads = (jnp.zeros_like(x_MD), jnp.zeros_like(w_EDF))
    dx_MD, dw_EDF = jax.lax.fori_loop(0, block.count, step, grads)
    return dx_MD[:M], dw_EDF, None


_by_blocks.defvjp(_forward, _backward)


class _Blocks:
    """Blocks of rows that lie in one group each, in the order of the rows."""

    def __init__(self, size_E: jax.Array) -> None:
        size_E = size_E.astype(jnp.int32)
        self.end_E = jnp.cumsum(size_E, dtype=jnp.int32)
        self.start_E = self.end_E - size_E
        blocks_E = (size_E + BLOCK - 1) // BLOCK
        self.last_E = jnp.cumsum(blocks_E, dtype=jnp.int32)
        self.first_E = self.last_E - blocks_E
        self.count = self.last_E[-1]

    def __call__(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The group of block i, its first row, and how many rows the group has from there on."""
        expert = jnp.sum(self.last_E <= i, dtype=jnp.int32)
        row = self.start_E[expert] + (i - self.first_E[expert]) * BLOCK
        return expert, row, self.end_E[expert] - row


def _padded(x_MD: jax.Array) -> jax.Array:
    return jnp.pad(x_MD, ((0, BLOCK), (0, 0)))


def _rows(x_MD: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_MD, row, BLOCK)


def _put(y_MF: jax.Array, rows: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(y_MF, rows, row, axis=0)
