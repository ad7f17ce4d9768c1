"""Attention: who sees whom, and the weighted sums. The one place of it.

A row's tokens stand at consecutive positions. Three ways of lying: plain rows; new tokens behind a cache, whose slot s
holds position s of its row; and packed rows, `[prompt | response | response ...]`. In blocks with a sliding window of
W, a token at position p sees positions p - W + 1 to p (Longformer, arXiv 2004.05150; Mistral, arXiv 2310.06825).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyValue(NamedTuple):
    """Keys (rotated) `[L, B, T, Kh, F]` and values `[L, B, T, Kh, Fv]` of new tokens, in every block.

    `F` and `Fv` are the same but for latent attention, which also has a key and a value for each query head.
    """

    k: jax.Array
    v: jax.Array


class Cache(NamedTuple):
    """Keys `[L, B, Kh, S, F]` and values `[L, B, Kh, S, Fv]` of every block; slot s holds position s.

    They lie as the products with them read them: else XLA keeps a second cache that does, while tokens are decoded.
    """

    k: jax.Array
    v: jax.Array


def as_cache(read: KeyValue) -> Cache:
    """Keys and values of tokens as a cache that holds them from its start."""
    return Cache(*(x.transpose(0, 1, 3, 2, 4) for x in read))


class Packing(NamedTuple):
    """Rows that hold a prompt and then `group` responses to it: `[prompt | response | response ...]`."""

    prefix: int  # places of the prompt; the responses share the rest equally
    group: int


class Scores(NamedTuple):
    """How scores are formed: `score = q . k * scale`, then `softcap * tanh(score / softcap)`; a head's sink, a learned
    logit, stands in the softmax's sum and gives nothing (gpt-oss; arXiv 2309.17453)."""

    scale: float
    softcap: float | None = None
    sink_H: jax.Array | None = None


Masks = tuple[jax.Array, ...]  # `[B, T, S]`, True where seen; one of plain rows, two of packed: prompt and responses


def attend(
    q_BTHF: jax.Array,
    keys: list[jax.Array],
    values: list[jax.Array],
    mask_BTS: jax.Array,
    scores: Scores,
    cache: Cache | None = None,
) -> jax.Array:
    """Grouped-query attention over a block's `cache`, then `keys` (each `[B, S_i, Kh, F]`), softmax in float32.

    The parts stay apart, so that a cache is read and never copied.

    Returns:
        The heads side by side, `[B, T, H * Fv]`.
    """
    B, T, H, F = q_BTHF.shape
    kv_heads = keys[0].shape[2]
    q = (q_BTHF * scores.scale).reshape(B, T, kv_heads, H // kv_heads, F)
    form = partial(jnp.einsum, preferred_element_type=jnp.float32)
    held = [] if cache is None else [form("btkgf,bksf->bkgts", q, cache.k)]
    score = jnp.concatenate([*held, *(form("btkgf,bskf->bkgts", q, k) for k in keys)], axis=-1)
    if scores.softcap is not None:
        score = scores.softcap * jnp.tanh(score / scores.softcap)
    score = jnp.where(mask_BTS[:, None, None], score, -1e30)
    if scores.sink_H is not None:
        sink = scores.sink_H.astype(jnp.float32).reshape(1, kv_heads, H // kv_heads, 1, 1)
        score = jnp.concatenate([score, jnp.broadcast_to(sink, (*score.shape[:-1], 1))], axis=-1)
    weight = jax.nn.softmax(score, axis=-1).astype(q_BTHF.dtype)
    out, start = None, 0
    parts = [] if cache is None else [("bkgts,bksf->btkgf", cache.v, cache.v.shape[2])]
    for product, v, size in [*parts, *(("bkgts,bskf->btkgf", v, v.shape[1]) for v in values)]:
        part = jnp.einsum(product, weight[..., start : start + size], v)
        out = part if out is None else out + part
        start += size
    assert out is not None
    return out.reshape(B, T, -1)


def causal_mask(position_BT: jax.Array, slots: int, window: int | None) -> jax.Array:
    """Each token sees itself and those before it in the array, and cache slots below the row's first position."""
    B, T = position_BT.shape
    mask_BTS = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    if slots:
        seen_BS = jnp.arange(slots, dtype=position_BT.dtype)[None, :] < position_BT[:, :1]
        mask_BTS = jnp.concatenate([jnp.broadcast_to(seen_BS[:, None, :], (B, T, slots)), mask_BTS], axis=-1)
    if window is None:
        return mask_BTS
    slot_BS = jnp.broadcast_to(jnp.arange(slots, dtype=position_BT.dtype)[None, :], (B, slots))
    place_BS = jnp.concatenate([slot_BS, position_BT], axis=1)
    return mask_BTS & (position_BT[:, :, None] - place_BS[:, None, :] < window)


def masks(position_BT: jax.Array, slots: int, packing: Packing | None, window: int | None) -> Masks:
    """What each token sees (see the top of this file); `slots` is the length of the cache, 0 without one."""
    if packing is None:
        return (causal_mask(position_BT, slots, window),)
    prompt = causal_mask(position_BT[:, : packing.prefix], 0, window)
    return prompt, causal_mask(_responses(position_BT, packing), packing.prefix, window)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache | None, seen: Masks, packing: Packing | None, how: Scores
) -> jax.Array:
    """Attend from the new tokens to themselves and to one block's cache, or inside packed rows.

    In packed rows, prompt tokens see the prompt so far; response tokens see the whole prompt and their own response so
    far. A response's first position is the length of its prompt, so padding behind the prompt is never seen.

    Returns:
        The heads side by side, `[B, T, H * Fv]`.
    """
    if packing is None:
        return attend(q, [k], [v], seen[0], how, cache)
    assert cache is None, "packed rows are read whole"
    prefix, group = packing
    shared_k, shared_v = (jnp.repeat(x[:, :prefix], group, axis=0) for x in (k, v))
    prompt = attend(q[:, :prefix], [k[:, :prefix]], [v[:, :prefix]], seen[0], how)
    q, k, v = (_responses(x, packing) for x in (q, k, v))
    response = attend(q, [shared_k, k], [shared_v, v], seen[1], how)
    return jnp.concatenate([prompt, response.reshape(prompt.shape[0], -1, prompt.shape[-1])], axis=1)


def _responses(x_PN: jax.Array, packing: Packing) -> jax.Array:
    """The responses of packed rows as rows of their own."""
    P, N = x_PN.shape[:2]
    prefix, group = packing
    return x_PN[:, prefix:].reshape(P * group, (N - prefix) // group, *x_PN.shape[2:])
