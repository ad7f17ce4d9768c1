"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; blocks stacked and scanned.

The module ends at the final norm: the head stays outside, so that kernels can own logits. Matrices are [in, out] and
each parameter declares its logical axes (`ppojax.mesh.RULES`) where it is created.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ppojax.models.linear import linear
from ppojax.models.spec import DecoderSpec


class KeyValue(NamedTuple):
    """Keys (rotated) and values of every block, `[L, B, S, Kh, F]`; slot s holds position s of its row."""

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """What every block of one forward pass shares."""

    cos_BTF: jax.Array
    sin_BTF: jax.Array
    mask_BTS: jax.Array  # True where a query may look; S runs over cache slots, then over the tokens themselves


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

    def __call__(self, x_BTD: jax.Array, context: Context, cache: KeyValue | None) -> tuple[jax.Array, KeyValue]:
        """Apply one block (its slice of the parameters); return the new tokens' keys and values too."""
        spec, (B, T, _) = self.spec, x_BTD.shape
        h = rms_norm(x_BTD, self.attn_norm[...], spec.norm_eps)
        q = linear(h, self.q[...]).reshape(B, T, spec.heads, spec.head_width)
        k = linear(h, self.k[...]).reshape(B, T, spec.kv_heads, spec.head_width)
        v = linear(h, self.v[...]).reshape(B, T, spec.kv_heads, spec.head_width)
        q, k = (rotate(a, context.cos_BTF, context.sin_BTF) for a in (q, k))
        keys, values = ([k], [v]) if cache is None else ([cache.k, k], [cache.v, v])
        x_BTD = x_BTD + linear(attend(q, keys, values, context.mask_BTS), self.o[...])
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
        self, token_BT: jax.Array, position_BT: jax.Array, cache: KeyValue | None = None, *, remat: bool = False
    ) -> tuple[jax.Array, KeyValue]:
        """Run the blocks over `token_BT`, whose tokens stand at `position_BT` of their rows.

        Without a cache a token sees itself and those before it in the array. With a cache it also sees the slots
        below the row's first new position. Rows are padded on the right: nothing real looks at padding.

        Returns:
            Hidden states `[B, T, D]` after the final norm, and the tokens' own keys and values.
        """
        T = token_BT.shape[1]
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (token_BT.shape[0], T, T))
        if cache is not None:
            slot_S = jnp.arange(cache.k.shape[2], dtype=position_BT.dtype)
            seen_BS = slot_S[None, :] < position_BT[:, :1]
            seen_BTS = jnp.broadcast_to(seen_BS[:, None, :], (*token_BT.shape, slot_S.shape[0]))
            mask = jnp.concatenate([seen_BTS, mask], axis=-1)
        context = Context(*rotary(position_BT, self.spec.head_width, self.spec.rope_theta), mask)
        graphdef, state = nnx.split(self.layers)

        def block(x: jax.Array, layer: tuple[nnx.State, KeyValue | None]) -> tuple[jax.Array, KeyValue]:
            return nnx.merge(graphdef, layer[0])(x, context, layer[1])

        step = jax.checkpoint(block, prevent_cse=False) if remat else block
        x_BTD, key_value = jax.lax.scan(step, self.embed[...][token_BT], (state, cache))
        return rms_norm(x_BTD, self.norm[...], self.spec.norm_eps), key_value
