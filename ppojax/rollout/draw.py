"""Drawing a token: what is cut off a distribution, the inverse of its CDF, and what is kept of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppojax.types import Recorded, Records

BLOCK = 256  # vocabulary block of the two-level inverse CDF
ONE_BITS = 30  # bits of a float32 in [0, 1], as an integer: 1.0 is 0x3f800000


class Cuts(NamedTuple):
    """Which tokens stay possible (static, hashable); off by default, and then nothing is computed."""

    top_k: int = 0  # this many of the likeliest; 0 for all
    top_p: float = 1.0  # the fewest of the likeliest that hold this share
    min_p: float = 0.0  # those at least this share as likely as the likeliest


NO_CUTS = Cuts()


def cut(logits_BV: jax.Array, cuts: Cuts) -> jax.Array:
    """Set the logits of tokens that may not be drawn to -inf: top-k, then top-p of what is left, then min-p.

    Equally likely tokens stay or go together. min-p: arXiv 2407.01082; top-p (nucleus): arXiv 1904.09751.
    """
    if cuts.top_k:
        top_BK, _ = jax.lax.top_k(logits_BV, min(cuts.top_k, logits_BV.shape[1]))
        logits_BV = jnp.where(logits_BV >= top_BK[:, -1:], logits_BV, -jnp.inf)
    if cuts.top_p < 1.0:
        logits_BV = jnp.where(_nucleus(logits_BV, cuts.top_p), logits_BV, -jnp.inf)
    if cuts.min_p > 0.0:
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(cuts.min_p)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def _nucleus(logits_BV: jax.Array, share: float) -> jax.Array:
    """Tokens whose weight is at least the largest threshold above which lies the share.

    The threshold is found bit by bit, for floats that are not negative are ordered as their bits: exact, and without
    a sort of the vocabulary, which takes several times longer.
    """
    weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    bits_BV = jax.lax.bitcast_convert_type(weight_BV, jnp.int32)
    target_B = share * jnp.sum(weight_BV, axis=-1)

    def refine(n: jax.Array, least_B: jax.Array) -> jax.Array:
        tried_B = least_B | (jnp.int32(1) << (ONE_BITS - 1 - n))
        mass_B = jnp.sum(jnp.where(bits_BV >= tried_B[:, None], weight_BV, 0.0), axis=-1)
        return jnp.where(mass_B >= target_B, tried_B, least_B)

    least_B = jax.lax.fori_loop(0, ONE_BITS, refine, jnp.zeros_like(target_B, jnp.int32))
    return bits_BV >= least_B[:, None]


def uniforms(key_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """The uniform number of each draw: a function of its row's key and its position only."""
    return jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))(key_B, position_B)


def sample(logits_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw a token of each row by inverting its CDF, first over blocks of the vocabulary, then inside one.

    Two short cumulative sums replace a Gumbel of the vocabulary's size: on CPU about twenty times cheaper.

    Returns:
        Token ids int32 `[B]`, and their log-probabilities float32 `[B]`.
    """
    B, V = logits_BV.shape
    top_B = jnp.max(logits_BV, axis=-1)
    weight_BV = jnp.exp(logits_BV - top_B[:, None])
    weight_BKC = jnp.pad(weight_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    mass_BK = jnp.sum(weight_BKC, axis=-1)
    block_B, rest_B, total_B = _invert(mass_BK, uniform_B * jnp.sum(mass_BK, axis=-1))
    inside_BC = jnp.take_along_axis(weight_BKC, block_B[:, None, None], axis=1)[:, 0]
    offset_B, _, _ = _invert(inside_BC, rest_B)
    token_B = block_B * BLOCK + offset_B
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - top_B - jnp.log(total_B)


def _invert(mass_BK: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First index whose running mass exceeds the target, the target left inside it, and the whole mass.

    Rounding may leave the target above the whole mass: the last index that has any mass is taken then. What is left
    of the target is never below 0, which would find an index without mass.
    """
    running_BK = jnp.cumsum(mass_BK, axis=-1)
    index_K = jnp.arange(mass_BK.shape[1], dtype=jnp.int32)
    last_B = jnp.max(jnp.where(mass_BK > 0, index_K[None, :], 0), axis=-1)
    index_B = jnp.minimum(jnp.sum(running_BK <= target_B[:, None], axis=-1, dtype=jnp.int32), last_B)
    before_B = jnp.take_along_axis(running_BK - mass_BK, index_B[:, None], axis=1)[:, 0]
    return index_B, jnp.maximum(target_B - before_B, 0.0), running_BK[:, -1]


def greedy_choice(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most likely token of each row and its log-probability."""
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]


def record(
    records: Records, logits_BV: jax.Array, hidden_BD: jax.Array, token_B: jax.Array, logp_B: jax.Array
) -> Recorded:
    """Keep what is asked for of the distributions that tokens were drawn from with their log-probabilities."""
    hidden = hidden_BD if records.hidden else None
    if not records.top_k:
        return Recorded(hidden=hidden)
    top_BK, id_BK = jax.lax.top_k(logits_BV, records.top_k)
    drawn_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
    return Recorded(id_BK, (top_BK - drawn_B1) + logp_B[:, None], hidden)
