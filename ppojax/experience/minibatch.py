"""Deal the rows of a step out as minibatches, and a minibatch as microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ppojax.mesh import sharding
from ppojax.types import Batch, Experience

Rows = TypeVar("Rows", Batch, Experience)


def map_rows(f: Callable[[jax.Array, int], jax.Array], tree: Rows) -> Rows:
    """Apply `f(array, axis of its rows)` to every array: values and returns carry the critics in front."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        return f(x, 1 if path[-1].name.endswith("_MBT") else 0)

    return jax.tree_util.tree_map_with_path(one, tree)


def split_rows(tree: Rows, rows: int, group: int = 1) -> Rows:
    """Split into parts of `rows` rows, on a new leading axis, keeping each `group` of consecutive rows together.

    Part i takes every n-th group, starting with group i. Strided, so that with groups split over devices every
    device keeps the rows that it has.
    """

    def split(x: jax.Array, axis: int) -> jax.Array:
        parts = x.shape[axis] // rows
        assert parts * rows == x.shape[axis], f"{x.shape[axis]} rows do not split into parts of {rows}"
        assert rows % group == 0, f"parts of {rows} rows would tear groups of {group}"
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        shaped = jnp.moveaxis(x.reshape(*before, rows // group, parts, group, *after), axis + 1, 0)
        return shaped.reshape(parts, *before, rows, *after)

    return map_rows(split, tree)


def join_rows(x: jax.Array, group: int = 1) -> jax.Array:
    """Undo `split_rows` for one array `[parts, rows, ...]`."""
    parts, rows, *rest = x.shape
    shaped = x.reshape(parts, rows // group, group, *rest)
    return jnp.moveaxis(shaped, 0, 1).reshape(parts * rows, *rest)


@partial(jax.jit, static_argnames=("mesh",))
def take_rows(tree: Rows, index: jax.Array, *, mesh: jax.sharding.Mesh) -> Rows:
    """Select rows by index, and split them over the mesh as the whole batch is."""
    return map_rows(lambda x, axis: _over_rows(jnp.take(x, index, axis=axis), axis, mesh), tree)


@partial(jax.jit, static_argnames=("mesh",))
def move_rows(tree: Rows, *, mesh: jax.sharding.Mesh) -> Rows:
    """Lay rows out as another mesh of the same devices, in the same order, wants them: between actor and critics."""
    return map_rows(lambda x, axis: _over_rows(x, axis, mesh), tree)


def _over_rows(x: jax.Array, axis: int, mesh: jax.sharding.Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, sharding(mesh, (None,) * axis + ("rows",)))


def minibatches(
    batch: Batch, count: int, seed: tuple[int, ...], group: int, mesh: jax.sharding.Mesh
) -> Iterator[Batch]:
    """Deal the rows out as `count` minibatches of equal size (their number must divide), in random groups of `group`.

    One minibatch is the batch itself, in its own order.
    """
    if count == 1:
        yield batch
        return
    for part in np.split(_dealt(batch.advantage_BT.shape[0], seed, group), count):
        yield take_rows(batch, part, mesh=mesh)


def put_back(parts: Sequence[np.ndarray], seed: tuple[int, ...], group: int) -> np.ndarray:
    """Undo `minibatches` for one array `[rows, ...]` of each of them, on the host."""
    if len(parts) == 1:
        return parts[0]
    joined = np.concatenate(parts)
    out = np.empty_like(joined)
    out[_dealt(len(joined), seed, group)] = joined
    return out


def _dealt(rows: int, seed: tuple[int, ...], group: int) -> np.ndarray:
    """The rows in the order in which several minibatches take them."""
    order = np.random.default_rng(seed).permutation(rows // group)
    return (order[:, None] * group + np.arange(group)[None, :]).reshape(-1).astype(np.int32)
