"""Deal the rows of a step out as minibatches, and a minibatch as microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ppojax.types import Batch, Experience

Rows = TypeVar("Rows", Batch, Experience)


def map_rows(f: Callable[[jax.Array, int], jax.Array], tree: Rows) -> Rows:
    """Apply `f(array, axis of its rows)` to every array: values and returns carry the critics in front."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        return f(x, 1 if path[-1].name.endswith("_MBT") else 0)

    return jax.tree_util.tree_map_with_path(one, tree)


def split_rows(tree: Rows, rows: int) -> Rows:
    """Split into parts of `rows` rows, on a new leading axis; part i takes every n-th row, starting with row i.

    Strided, so that with rows split over devices every device keeps the rows that it has.
    """

    def split(x: jax.Array, axis: int) -> jax.Array:
        parts = x.shape[axis] // rows
        assert parts * rows == x.shape[axis], f"{x.shape[axis]} rows do not split into parts of {rows}"
        shaped = x.reshape(*x.shape[:axis], rows, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(shaped, axis + 1, 0)

    return map_rows(split, tree)


@partial(jax.jit)
def take_rows(tree: Rows, index: jax.Array) -> Rows:
    """Select rows by index."""
    return map_rows(lambda x, axis: jnp.take(x, index, axis=axis), tree)


def minibatches(batch: Batch, count: int, seed: tuple[int, ...]) -> Iterator[Batch]:
    """Shuffle the rows and deal them out as `count` minibatches of equal size (their number must divide)."""
    rows = batch.advantage_BT.shape[0]
    order = np.random.default_rng(seed).permutation(rows)
    for part in np.split(order, count):
        yield take_rows(batch, part) if count > 1 else batch
