"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; blocks stacked and scanned.

The module ends at the final norm: the head stays outside, so that kernels can own logits. Matrices are [in, out] and
each parameter declares its logical axes (`ppojax.mesh.RULES`) where it is created.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.models.linear import linear
from ppojax.models.spec import DecoderSpec, Remat


class KeyValue(NamedTuple):
    """Keys (rotated) and values of every block, `[L, B, S, Kh, F]`; slot s holds position s of its row."""

    k: jax.Array
    v: jax.Array


class Packing(NamedTuple):
    """Rows that hold a prompt and then `group` responses to it: `[prompt | response | response ...]`."""

    prefix: int  # places of the prompt; the responses share the rest equally
    group: int


Attention = Callable[[jax.Array, jax.Array, jax.Array, "KeyValue | None"], jax.Array]


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float | None) -> nnx.Param:
    """Create a float32 parameter: normal with `std`, or ones when it is None."""
    value = jnp.ones(shape, jnp.float32) if std is None else std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean x^2 + eps) * scale, computed in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotary(position_BT: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * theta^(-2i/width), each angle twice ("rotate half" layout; arXiv 2104.09864)."""
    inverse = jnp.asarray([theta ** (-2.0 * i / width) for i in range(width // 2)], jnp.float32)
    angle = position_BT.astype(jnp.float32)[..., None] * inverse[None, None, :]
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHF: jax.Array, cos_BTF: jax.Array, sin_BTF: jax.Array) -> jax.Array:
    """Apply rotary positions to every head, in float32."""
    x = x_BTHF.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos_BTF[:, :, None, :] + turned * sin_BTF[:, :, None, :]).astype(x_BTHF.dtype)


def attend(q_BTHF: jax.Array, keys: list[jax.Array], values: list[jax.Array], mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention over the concatenation of `keys` (each `[B, S_i, Kh, F]`), softmax in float32.

    The parts stay apart (a cache and the new tokens), so that a cache is read and never copied.
    """
    B, T, H, F = q_BTHF.shape
    kv_heads = keys[0].shape[2]
    q = (q_BTHF * (1.0 / math.sqrt(F))).reshape(B, T, kv_heads, H // kv_heads, F)
    scores = [jnp.einsum("btkgf,bskf->bkgts", q, k, preferred_element_type=jnp.float32) for k in keys]
    score = jnp.where(mask_BTS[:, None, None], jnp.concatenate(scores, axis=-1), -1e30)
    weight = jax.nn.softmax(score, axis=-1).astype(q_BTHF.dtype)
    out, start = jnp.zeros_like(q), 0
    for v in values:
        part = weight[..., start : start + v.shape[1]]
        out = out + jnp.einsum("bkgts,bskf->btkgf", part, v)
        start += v.shape[1]
    return out.reshape(B, T, H * F)


def causal_attention(position_BT: jax.Array, slots: int) -> Attention:
    """Each token sees itself and those before it in the array, and cache slots below the row's first position."""
    B, T = position_BT.shape
    mask_BTS = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    if slots:
        seen_BS = jnp.arange(slots, dtype=position_BT.dtype)[None, :] < position_BT[:, :1]
        mask_BTS = jnp.concatenate([jnp.broadcast_to(seen_BS[:, None, :], (B, T, slots)), mask_BTS], axis=-1)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, cache: KeyValue | None) -> jax.Array:
        keys, values = ([k], [v]) if cache is None else ([cache.k, k], [cache.v, v])
        return attend(q, keys, values, mask_BTS)

    return attention


def packed_attention(position_PN: jax.Array, packing: Packing) -> Attention:
    """Prompt tokens see the prompt so far; response tokens see the whole prompt and their own response so far.

    A response's first position is the length of its prompt, so padding behind the prompt is never seen.
    """
    P, N = position_PN.shape
    prefix, group = packing
    R = (N - prefix) // group
    first_B = position_PN[:, prefix:].reshape(P * group, R)[:, :1]
    prompt = causal_attention(position_PN[:, :prefix], 0)
    response = causal_attention(jnp.broadcast_to(first_B, (P * group, R)), prefix)

    def rows(x_PN: jax.Array) -> jax.Array:
        return x_PN[:, prefix:].reshape(P * group, R, *x_PN.shape[2:])

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, cache: KeyValue | None) -> jax.Array:
        assert cache is None, "packed rows are read whole"
        shared = KeyValue(*(jnp.repeat(x[:, :prefix], group, axis=0) for x in (k, v)))
        above = prompt(q[:, :prefix], k[:, :prefix], v[:, :prefix], None)
        below = response(rows(q), rows(k), rows(v), shared)
        return jnp.concatenate([above, below.reshape(P, group * R, -1)], axis=1)

    return attention


def rematerialised(block: Callable, remat: Remat) -> Callable:
    """Choose what of a block is kept for its backward pass: everything, the matrix products, or its input only."""
    if remat == "none":
        return block
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(block, prevent_cse=False, policy=policy)


class Layers(nnx.Module):
    """Every transformer block at once: parameters carry a leading layer axis, over which `Decoder` scans."""

    def __init__(self, spec: DecoderSpec, rngs: nnx.Rngs) -> None:
        L, D, F = spec.layers, spec.width, spec.head_width
        q_out, kv_out = spec.heads * F, spec.kv_heads * F
        into, out = 1.0 / math.sqrt(D), 1.0 / math.sqrt(2 * L)
        self.spec = spec
        self.attn_norm = parameter(rngs, (L, D), (None, None), None)
        self.q = parameter(rngs, (L, D, q_out), (None, "embed", "heads"), into)
        self.k = parameter(rngs, (L, D, kv_out), (None, "embed", "kv_heads"), into)
        self.v = parameter(rngs, (L, D, kv_out), (None, "embed", "kv_heads"), into)
        self.o = parameter(rngs, (L, q_out, D), (None, "heads", "embed"), out / math.sqrt(q_out))
        self.mlp_norm = parameter(rngs, (L, D), (None, None), None)
        self.gate = parameter(rngs, (L, D, spec.ffn), (None, "embed", "ffn"), into)
        self.up = parameter(rngs, (L, D, spec.ffn), (None, "embed", "ffn"), into)
        self.down = parameter(rngs, (L, spec.ffn, D), (None, "ffn", "embed"), out / math.sqrt(spec.ffn))

    def __call__(
        self,
        x_BTD: jax.Array,
        turn: tuple[jax.Array, jax.Array],
        attention: Attention,
        cache: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue]:
        """Apply one block (its slice of the parameters); return the new tokens' keys and values too."""
        spec, (B, T, _) = self.spec, x_BTD.shape
        h = rms_norm(x_BTD, self.attn_norm[...], spec.norm_eps)
        q = linear(h, self.q[...]).reshape(B, T, spec.heads, spec.head_width)
        k = linear(h, self.k[...]).reshape(B, T, spec.kv_heads, spec.head_width)
        v = linear(h, self.v[...]).reshape(B, T, spec.kv_heads, spec.head_width)
        q, k = rotate(q, *turn), rotate(k, *turn)
        x_BTD = x_BTD + linear(attention(q, k, v, cache), self.o[...])
        h = rms_norm(x_BTD, self.mlp_norm[...], spec.norm_eps)
        x_BTD = x_BTD + linear(jax.nn.silu(linear(h, self.gate[...])) * linear(h, self.up[...]), self.down[...])
        return x_BTD, KeyValue(k, v)


class Decoder(nnx.Module):
    """Tokens to final hidden states."""

    def __init__(self, spec: DecoderSpec, rngs: nnx.Rngs) -> None:
        std = 1.0 / math.sqrt(spec.width)
        self.spec = spec
        self.embed = parameter(rngs, (spec.vocab, spec.width), ("vocab", "embed"), std)
        self.layers = Layers(spec, rngs)
        self.norm = parameter(rngs, (spec.width,), (None,), None)
        if not spec.tied:
            self.head = parameter(rngs, (spec.vocab, spec.width), ("vocab", "embed"), std)

    def __call__(
        self,
        token_BT: jax.Array,
        position_BT: jax.Array,
        cache: KeyValue | None = None,
        packing: Packing | None = None,
        *,
        remat: Remat = "none",
    ) -> tuple[jax.Array, KeyValue]:
        """Run the blocks over `token_BT`, whose tokens stand at `position_BT` of their rows.

        Rows are padded on the right: nothing real looks at padding. What a token sees: `causal_attention`, or
        `packed_attention` where a packing is given.

        Returns:
            Hidden states `[B, T, D]` after the final norm, and the tokens' own keys and values.
        """
        if packing is None:
            attention = causal_attention(position_BT, 0 if cache is None else cache.k.shape[2])
        else:
            attention = packed_attention(position_BT, packing)
        turn = rotary(position_BT, self.spec.head_width, self.spec.rope.theta)
        graphdef, state = nnx.split(self.layers)

        def block(x: jax.Array, layer: tuple[nnx.State, KeyValue | None]) -> tuple[jax.Array, KeyValue]:
            return nnx.merge(graphdef, layer[0])(x, turn, attention, layer[1])

        x_BTD, key_value = jax.lax.scan(rematerialised(block, remat), self.embed[...][token_BT], (state, cache))
        return rms_norm(x_BTD, self.norm[...], self.spec.norm_eps), key_value
