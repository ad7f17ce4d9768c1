"""Token statistics over tiles of rows: the logits of one tile live at a time, in the forward and in the backward.

With g = d loss / d logp and h = d loss / d entropy,

    d loss / d z[n, v] = g_n (1[v = target_n] - p[n, v]) - h_n p[n, v] (log p[n, v] + entropy_n),

so one backward sweep serves both statistics, and beyond its inputs it needs the log-sum-exp and the entropy of each
row, N numbers each. Capped logits, z = cap tanh(x / cap) / temperature, need nothing more: dz/dx is
(1 - (z temperature / cap)^2) / temperature. A tile's logits are recomputed there: a fourth product beside the three of
the naive way. Only when all the logits fit in `KEEP_BYTES` is there a single tile, and it is kept instead.

Peak temporary memory, besides the head's gradient in float32 (twice): a few tiles, or a few times the kept logits.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ppojax.kernels.reference import logits, product_dtype
from ppojax.lazy import Float, Int
from ppojax.types import TokenStats

# Bytes of one tile of float32 logits. Each tile adds a [V, D] product to the head's gradient, so small tiles are bound
# by that traffic; past some 200 rows, which this gives a vocabulary of 150,000, the products are bound by arithmetic
# and larger tiles only cost memory.
TILE_BYTES = 128 * 2**20
# Bytes of float32 logits up to which all of them are kept for the backward: less memory than the rest of a step, and a
# quarter less arithmetic.
KEEP_BYTES = 256 * 2**20
_ROW_MULTIPLE = 8


def tile_rows(rows: int, vocabulary: int) -> int:
    """Choose how many of `rows` go into a tile: all that `KEEP_BYTES` allows, or else even shares of `TILE_BYTES`."""
    if 4 * rows * vocabulary <= KEEP_BYTES:
        return rows
    fit = max(1, TILE_BYTES // (4 * vocabulary * _ROW_MULTIPLE)) * _ROW_MULTIPLE
    tiles = -(-rows // fit)
    even = -(-rows // tiles)
    return min(rows, -(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def token_stats(
    hidden_ND: Float[jax.Array, "N D"],
    head_VD: Float[jax.Array, "V D"],
    target_N: Int[jax.Array, " N"],
    *,
    temperature: float,
    entropy: bool,
    softcap: float | None = None,
    rows_per_tile: int | None = None,
) -> TokenStats:
    """Compute `ppojax.kernels.token_stats` tile by tile; `rows_per_tile` overrides the byte budget."""
    rows = hidden_ND.shape[0]
    if rows == 0:
        empty_N = jnp.zeros(0, jnp.float32)
        return TokenStats(empty_N, empty_N if entropy else None)
    per_tile = tile_rows(rows, head_VD.shape[0]) if rows_per_tile is None else rows_per_tile
    return _token_stats(temperature, entropy, softcap, -(-rows // per_tile), hidden_ND, head_VD, target_N)


def _to_tiles(x: jax.Array, tiles: int) -> jax.Array:
    # Tile i takes rows i, i + tiles, i + 2 tiles ...: when the rows are sharded, every tile has a share on each device.
    padded = jnp.pad(x, [(0, -x.shape[0] % tiles)] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(padded.reshape(-1, tiles, *x.shape[1:]), 0, 1)


def _from_tiles(x: jax.Array, rows: int) -> jax.Array:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:rows]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _token_stats(temperature, entropy, softcap, tiles, hidden_ND, head_VD, target_N):
    return _forward(temperature, entropy, softcap, tiles, hidden_ND, head_VD, target_N)[0]


def _forward(temperature, entropy, softcap, tiles, hidden_ND, head_VD, target_N):
    rows = hidden_ND.shape[0]

    def tile(carry, inputs):
        hidden_nD, target_n = inputs
        z_nV = logits(hidden_nD, head_VD, temperature, softcap)
        max_n = jnp.max(z_nV, axis=-1)
        shifted_nV = z_nV - max_n[:, None]
        exp_nV = jnp.exp(shifted_nV)
        total_n = jnp.sum(exp_nV, axis=-1)
        log_total_n = jnp.log(total_n)
        logp_n = jnp.take_along_axis(z_nV, target_n[:, None], axis=-1)[:, 0] - max_n - log_total_n
        # Relative to the row's maximum, so that nothing cancels when the logits are large.
        entropy_n = log_total_n - jnp.sum(exp_nV * shifted_nV, axis=-1) / total_n if entropy else None
        return carry, (logp_n, max_n + log_total_n, entropy_n, z_nV if tiles == 1 else None)

    _, stacked = jax.lax.scan(tile, None, (_to_tiles(hidden_ND, tiles), _to_tiles(target_N, tiles)))
    logp_N, lse_N, entropy_N, z_NV = jax.tree.map(partial(_from_tiles, rows=rows), stacked)
    return TokenStats(logp_N, entropy_N), (hidden_ND, head_VD, target_N, lse_N, entropy_N, z_NV)


def _backward(temperature, entropy, softcap, tiles, residuals, cotangent):
    hidden_ND, head_VD, target_N, lse_N, entropy_N, z_NV = residuals
    dtype = product_dtype(hidden_ND, head_VD)
    head_in_dtype_VD = head_VD.astype(dtype)

    def tile(d_head_VD, inputs):
        hidden_nD, target_n, lse_n, entropy_n, z_nV, d_logp_n, d_entropy_n = inputs
        z_nV = logits(hidden_nD, head_VD, temperature, softcap) if z_nV is None else z_nV
        logp_nV = z_nV - lse_n[:, None]
        hit_nV = jax.lax.broadcasted_iota(target_n.dtype, logp_nV.shape, 1) == target_n[:, None]
        weight_nV = jnp.broadcast_to(d_logp_n[:, None], logp_nV.shape)
        if entropy:
            weight_nV = weight_nV + d_entropy_n[:, None] * (logp_nV + entropy_n[:, None])
        d_z_nV = jnp.where(hit_nV, d_logp_n[:, None], 0.0) - jnp.exp(logp_nV) * weight_nV
        if softcap is not None:
            d_z_nV = d_z_nV * (1.0 - jnp.square(z_nV * (temperature / softcap)))
        d_z_nV = (d_z_nV if temperature == 1.0 else d_z_nV / temperature).astype(dtype)
        d_hidden_nD = jnp.matmul(d_z_nV, head_in_dtype_VD, preferred_element_type=jnp.float32)
        d_head_VD += jnp.matmul(d_z_nV.T, hidden_nD.astype(dtype), preferred_element_type=jnp.float32)
        return d_head_VD, d_hidden_nD.astype(hidden_ND.dtype)

    per_row = (hidden_ND, target_N, lse_N, entropy_N, z_NV, cotangent.logp, cotangent.entropy)
    inputs = jax.tree.map(partial(_to_tiles, tiles=tiles), per_row)
    d_head_VD, d_hidden = jax.lax.scan(tile, jnp.zeros(head_VD.shape, jnp.float32), inputs)
    return _from_tiles(d_hidden, hidden_ND.shape[0]), d_head_VD.astype(head_VD.dtype), None


_token_stats.defvjp(_forward, _backward)
