"""Token statistics over tiles of the logits, of which one lives at a time.

The mathematics of a tile is in `ppojax.kernels.rows`, its passes over the words in `ppojax.kernels.sweeps`. The
forward's tiles are some rows with all words, so that a row is normalised at once. The backward knows the normalisers:
its tiles are some words with all rows. Those words' part of the head's gradient is then one product, written where it
belongs in the head's type, and nothing of the head's size is carried from tile to tile; the hidden states' gradient is,
in float32.

Logits are computed again in the backward: a fourth product beside the three of the naive way (a reference's too: six
instead of four, none of which is for its gradient). Only when all the logits fit in `KEEP_BYTES` is there a single
tile, and it is kept instead. Capped logits, z = cap tanh(x / cap) / temperature, need nothing more: dz/dx is
(1 - (z temperature / cap)^2) / temperature.

Peak temporary memory: a tile of logits and half of one (its gradient), and the hidden states in float32; or a few times
the kept logits. A head in parts over a mesh has its gradient in float32 besides, to be added up over the devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppojax.kernels.reference import logits, product_dtype
from ppojax.kernels.rows import WHOLE, Residuals, Split, gradient, line, statistics, within
from ppojax.kernels.sweeps import XLA, Ask, Slope, Sweeps
from ppojax.types import TokenStats

# Bytes of one tile of float32 logits: some 400 rows of a vocabulary of 150,000. A forward tile of n rows reads the head
# for n multiply-adds a number, a backward tile of n words reads and writes the hidden states' gradient for 3n; below
# some 200 rows that traffic, not arithmetic, bounds the products on a GPU. Larger tiles only cost memory.
TILE_BYTES = 256 * 2**20
# Bytes of float32 logits up to which all of them are kept for the backward: less memory than the rest of a step, and a
# quarter less arithmetic.
KEEP_BYTES = 512 * 2**20
_ROW_MULTIPLE = 8


class Inputs(NamedTuple):
    """Arrays that statistics are taken of, or their specs; the last three are None where they are not asked for."""

    hidden_ND: Any
    head_VD: Any
    target_N: Any
    reference_hidden_ND: Any = None
    reference_head_VD: Any = None
    id_NK: Any = None


class Plan(NamedTuple):
    """All that is static."""

    temperature: float
    softcap: float | None
    ask: Ask
    tiles: int
    sweeps: Sweeps = XLA
    split: Split = WHOLE


Sums = tuple[jax.Array, jax.Array]  # the gradients of the hidden states and of the head so far


class Saved(NamedTuple):
    """What the forward leaves for the backward, beside its inputs."""

    residuals: Residuals
    z_NV: Any  # the logits, where all of them are kept
    y_NV: Any


def tile_rows(rows: int, vocabulary: int) -> int:
    """Choose how many of `rows` go into a tile: all that `KEEP_BYTES` allows, or else even shares of `TILE_BYTES`."""
    if 4 * rows * vocabulary <= KEEP_BYTES:
        return rows
    fit = TILE_BYTES // (4 * vocabulary)
    multiple = 128 if fit >= 128 else _ROW_MULTIPLE  # 128: of a GPU's or a TPU's matrix unit
    fit = max(1, fit // multiple) * multiple
    tiles = -(-rows // fit)
    even = -(-rows // tiles)
    return min(rows, -(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def token_stats(
    inputs: Inputs,
    *,
    temperature: float,
    softcap: float | None,
    ask: Ask,
    sweeps: Sweeps = XLA,
    rows_per_tile: int | None = None,
) -> TokenStats:
    """Compute `ppojax.kernels.token_stats` tile by tile.

    `rows_per_tile`, of the forward, overrides the byte budget; the backward has as many tiles, of words.
    """
    return _token_stats(plan(inputs, temperature, softcap, ask, sweeps, rows_per_tile), inputs)


def plan(
    inputs: Inputs,
    temperature: float,
    softcap: float | None,
    ask: Ask,
    sweeps: Sweeps = XLA,
    rows_per_tile: int | None = None,
    split: Split = WHOLE,
) -> Plan:
    """Choose the tiles; a reference's logits share the budget."""
    rows, vocabulary = inputs.hidden_ND.shape[0], inputs.head_VD.shape[0]
    per_tile = tile_rows(rows, vocabulary * (2 if ask.reference else 1)) if rows_per_tile is None else rows_per_tile
    return Plan(temperature, softcap, ask, max(1, -(-rows // max(per_tile, 1))), sweeps, split)


def _to_tiles(x: jax.Array, tiles: int) -> jax.Array:
    # Tile i takes rows i, i + tiles, i + 2 tiles ...: when the rows are sharded, every tile has a share on each device.
    padded = jnp.pad(x, [(0, -x.shape[0] % tiles)] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(padded.reshape(-1, tiles, *x.shape[1:]), 0, 1)


def _from_tiles(x: jax.Array, rows: int) -> jax.Array:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:rows]


def _reference_logits(hidden_nD: jax.Array | None, head_VD: jax.Array | None, plan: Plan) -> jax.Array | None:
    if hidden_nD is None or head_VD is None:
        return None
    return logits(hidden_nD, head_VD, plan.temperature, plan.softcap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(plan: Plan, inputs: Inputs) -> TokenStats:
    return forward(plan, inputs)[0]


def forward(plan: Plan, inputs: Inputs) -> tuple[TokenStats, Saved]:
    """Statistics of every row, and what the backward needs."""
    keep = plan.tiles == 1

    def tile(carry: None, row: tuple) -> tuple[None, tuple[TokenStats, Saved]]:
        hidden_nD, target_n, reference_nD, id_nK = row
        z_nV = logits(hidden_nD, inputs.head_VD, plan.temperature, plan.softcap)
        y_nV = _reference_logits(reference_nD, inputs.reference_head_VD, plan)
        stats, residuals = statistics(z_nV, y_nV, target_n, id_nK, plan.ask, plan.sweeps, plan.split)
        return carry, (stats, Saved(residuals, z_nV if keep else None, y_nV if keep else None))

    per_row = (inputs.hidden_ND, inputs.target_N, inputs.reference_hidden_ND, inputs.id_NK)
    _, stacked = jax.lax.scan(tile, None, jax.tree.map(partial(_to_tiles, tiles=plan.tiles), per_row))
    return jax.tree.map(partial(_from_tiles, rows=inputs.hidden_ND.shape[0]), stacked)


def tile_words(vocabulary: int, tiles: int) -> int:
    """Choose how many words go into a tile of the backward: even shares, rounded up to whole blocks."""
    share = -(-vocabulary // tiles)
    multiple = 2048 if share > 4096 else 128 if vocabulary >= 128 else 16
    return min(vocabulary, -(-share // multiple) * multiple)


def backward(plan: Plan, inputs: Inputs, saved: Saved, cotangent: TokenStats) -> tuple[jax.Array, jax.Array]:
    """Gradients of the hidden states and of the head, in their types; float32 parts of them under a split."""
    vocabulary = inputs.head_VD.shape[0]
    words = tile_words(vocabulary, plan.tiles)
    dtypes = [jnp.dtype("float32") if plan.split.axis else x.dtype for x in (inputs.hidden_ND, inputs.head_VD)]
    add = _backward_tile(plan, inputs, saved, cotangent, words)
    zero = jnp.zeros(inputs.hidden_ND.shape, jnp.float32), jnp.zeros(inputs.head_VD.shape, dtypes[1])
    # Backwards: the last tile reaches into the one before it, which then writes over what they share.
    first_word = jnp.arange(-(-vocabulary // words), dtype=jnp.int32) * words
    sums = jax.lax.scan(add, zero, first_word, reverse=True)[0] if words < vocabulary else add(zero, 0)[0]
    return sums[0].astype(dtypes[0]), sums[1]


def _backward_tile(
    plan: Plan, inputs: Inputs, saved: Saved, cotangent: Any, words: int
) -> Callable[[Sums, Any], tuple[Sums, None]]:
    """Make the function that adds the part of a tile, given its first word, to the gradients so far."""
    width = inputs.head_VD.shape[0]
    place_N = plan.split.local(inputs.target_N, width)
    place_NK = None if inputs.id_NK is None else plan.split.local(inputs.id_NK, width)
    numbers = line(inputs.id_NK, saved.residuals, cotangent, plan.ask)
    slope = Slope(plan.temperature, plan.softcap)
    dtype = product_dtype(inputs.hidden_ND, inputs.head_VD)

    def add(sums: Sums, first: Any) -> tuple[Sums, None]:
        start = first if width % words == 0 else jnp.minimum(first, width - words)
        head_vD = _words(inputs.head_VD, start, words)
        z_Nv, y_Nv = saved.z_NV, saved.y_NV
        if z_Nv is None:
            other_vR = jax.tree.map(lambda x: _words(x, start, words), inputs.reference_head_VD)  # may be None
            z_Nv = logits(inputs.hidden_ND, head_vD, plan.temperature, plan.softcap)
            y_Nv = _reference_logits(inputs.reference_hidden_ND, other_vR, plan)
        topk = None if place_NK is None else (within(place_NK - start, words), cotangent.topk_logp)
        place = within(place_N - start, words)
        d_x_Nv = gradient(z_Nv, y_Nv, saved.residuals, numbers, place, topk, plan.sweeps, slope, dtype)
        if width % words:  # words of the tile before count there
            head_vD = jnp.where(jnp.arange(words)[:, None] >= first - start, head_vD, jnp.zeros((), head_vD.dtype))
        d_hidden_ND = sums[0] + jnp.matmul(d_x_Nv, head_vD.astype(dtype), preferred_element_type=jnp.float32)
        d_head_vD = jnp.matmul(d_x_Nv.T, inputs.hidden_ND.astype(dtype), preferred_element_type=jnp.float32)
        return (d_hidden_ND, _put_words(sums[1], d_head_vD.astype(sums[1].dtype), start)), None

    return add


def _words(x_VD: jax.Array, start: Any, words: int) -> jax.Array:
    return x_VD if x_VD.shape[0] == words else jax.lax.dynamic_slice_in_dim(x_VD, start, words)


def _put_words(x_VD: jax.Array, part_vD: jax.Array, start: Any) -> jax.Array:
    whole = x_VD.shape == part_vD.shape
    return part_vD if whole else jax.lax.dynamic_update_slice_in_dim(x_VD, part_vD, start, axis=0)


def only(inputs: Inputs, d_hidden_ND: jax.Array, d_head_VD: jax.Array) -> Inputs:
    """Cotangents of all inputs: a reference is a constant."""
    nothing = jax.tree.map(lambda x: None, inputs)
    zero = [None if x is None else jnp.zeros_like(x) for x in (inputs.reference_hidden_ND, inputs.reference_head_VD)]
    return nothing._replace(
        hidden_ND=d_hidden_ND.astype(inputs.hidden_ND.dtype),
        head_VD=d_head_VD.astype(inputs.head_VD.dtype),
        reference_hidden_ND=zero[0],
        reference_head_VD=zero[1],
    )


def _forward(plan: Plan, inputs: Inputs) -> tuple[TokenStats, tuple[Inputs, Saved]]:
    stats, saved = forward(plan, inputs)
    return stats, (inputs, saved)


def _backward(plan: Plan, residuals: tuple[Inputs, Saved], cotangent: Any) -> tuple[Inputs]:
    inputs, saved = residuals
    return (only(inputs, *backward(plan, inputs, saved, cotangent)),)


_token_stats.defvjp(_forward, _backward)
