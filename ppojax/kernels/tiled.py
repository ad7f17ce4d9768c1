"""Token statistics over tiles of rows: the logits of one tile live at a time, in the forward and in the backward.

The mathematics of a tile is in `ppojax.kernels.rows`, its passes over the words in `ppojax.kernels.sweeps`. A tile's
logits are recomputed in the backward: a fourth product beside the three of the naive way (a reference's too: six
instead of four, none of which is for its gradient). Only when all the logits fit in `KEEP_BYTES` is there a single
tile, and it is kept instead. Capped logits, z = cap tanh(x / cap) / temperature, need nothing more: dz/dx is
(1 - (z temperature / cap)^2) / temperature.

Peak temporary memory, besides the head's gradient in float32 (twice): a few tiles, or a few times the kept logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppojax.kernels.reference import logits, product_dtype
from ppojax.kernels.rows import WHOLE, Residuals, Split, gradient, statistics
from ppojax.kernels.sweeps import XLA, Ask, Slope, Sweeps
from ppojax.types import TokenStats

# Bytes of one tile of float32 logits. Each tile adds a [V, D] product to the head's gradient, so small tiles are bound
# by that traffic; past some 200 rows, which this gives a vocabulary of 150,000, the products are bound by arithmetic
# and larger tiles only cost memory.
TILE_BYTES = 128 * 2**20
# Bytes of float32 logits up to which all of them are kept for the backward: less memory than the rest of a step, and a
# quarter less arithmetic.
KEEP_BYTES = 256 * 2**20
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


class Saved(NamedTuple):
    """What the forward leaves for the backward, beside its inputs."""

    residuals: Residuals
    z_NV: Any  # the logits, where all of them are kept
    y_NV: Any


def tile_rows(rows: int, vocabulary: int) -> int:
    """Choose how many of `rows` go into a tile: all that `KEEP_BYTES` allows, or else even shares of `TILE_BYTES`."""
    if 4 * rows * vocabulary <= KEEP_BYTES:
        return rows
    fit = max(1, TILE_BYTES // (4 * vocabulary * _ROW_MULTIPLE)) * _ROW_MULTIPLE
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
    """Compute `ppojax.kernels.token_stats` tile by tile; `rows_per_tile` overrides the byte budget."""
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


def _reference_logits(hidden_nD: jax.Array | None, inputs: Inputs, plan: Plan) -> jax.Array | None:
    if hidden_nD is None or inputs.reference_head_VD is None:
        return None
    return logits(hidden_nD, inputs.reference_head_VD, plan.temperature, plan.softcap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(plan: Plan, inputs: Inputs) -> TokenStats:
    return forward(plan, inputs)[0]


def forward(plan: Plan, inputs: Inputs) -> tuple[TokenStats, Saved]:
    """Statistics of every row, and what the backward needs."""
    keep = plan.tiles == 1

    def tile(carry: None, row: tuple) -> tuple[None, tuple[TokenStats, Saved]]:
        hidden_nD, target_n, reference_nD, id_nK = row
        z_nV = logits(hidden_nD, inputs.head_VD, plan.temperature, plan.softcap)
        y_nV = _reference_logits(reference_nD, inputs, plan)
        stats, residuals = statistics(z_nV, y_nV, target_n, id_nK, plan.ask, plan.sweeps, plan.split)
        return carry, (stats, Saved(residuals, z_nV if keep else None, y_nV if keep else None))

    per_row = (inputs.hidden_ND, inputs.target_N, inputs.reference_hidden_ND, inputs.id_NK)
    _, stacked = jax.lax.scan(tile, None, jax.tree.map(partial(_to_tiles, tiles=plan.tiles), per_row))
    return jax.tree.map(partial(_from_tiles, rows=inputs.hidden_ND.shape[0]), stacked)


def backward(plan: Plan, inputs: Inputs, saved: Saved, cotangent: TokenStats) -> tuple[jax.Array, jax.Array]:
    """Gradients of the hidden states (in their type) and of the head (float32); parts of them under a split."""
    dtype = product_dtype(inputs.hidden_ND, inputs.head_VD)
    head_in_dtype_VD = inputs.head_VD.astype(dtype)

    def tile(d_head_VD: jax.Array, row: tuple) -> tuple[jax.Array, jax.Array]:
        (hidden_nD, target_n, reference_nD, id_nK), saved, cotangent = row
        z_nV = saved.z_NV
        if z_nV is None:
            z_nV = logits(hidden_nD, inputs.head_VD, plan.temperature, plan.softcap)
        y_nV = _reference_logits(reference_nD, inputs, plan) if saved.y_NV is None else saved.y_NV
        d_x_nV = gradient(
            z_nV,
            y_nV,
            target_n,
            id_nK,
            saved.residuals,
            cotangent,
            plan.ask,
            plan.sweeps,
            Slope(plan.temperature, plan.softcap),
            dtype,
            plan.split,
        )
        d_hidden_nD = jnp.matmul(d_x_nV, head_in_dtype_VD, preferred_element_type=jnp.float32)
        d_head_VD += jnp.matmul(d_x_nV.T, hidden_nD.astype(dtype), preferred_element_type=jnp.float32)
        return d_head_VD, d_hidden_nD if plan.split.axis else d_hidden_nD.astype(inputs.hidden_ND.dtype)

    per_row = (inputs.hidden_ND, inputs.target_N, inputs.reference_hidden_ND, inputs.id_NK)
    rows = jax.tree.map(partial(_to_tiles, tiles=plan.tiles), (per_row, saved, cotangent))
    d_head_VD, d_hidden = jax.lax.scan(tile, jnp.zeros(inputs.head_VD.shape, jnp.float32), rows)
    return _from_tiles(d_hidden, inputs.hidden_ND.shape[0]), d_head_VD


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
