"""The decoder written out in float64 numpy, token by token and head by head, and specs that use all of its features."""

from __future__ import annotations

import math
import zlib
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from ppojax.models.forward import ModelDef, Params, init
from ppojax.models.spec import DecoderSpec, MLASpec, RopeSpec

SMALL: dict[str, Any] = {"layers": 3, "width": 24, "ffn": 20, "vocab": 32, "norm_eps": 1e-3}
YARN = RopeSpec(theta=500.0, scaling="yarn", factor=4.0, original=64, beta_fast=4.0, magnitude=1.2)
ALTERNATE = {"window": 4, "windowed": (True, False, True)}

SPECS = {
    "llama": DecoderSpec(**SMALL, heads=8, kv_heads=4, head_width=4, rope=RopeSpec(theta=500.0), tied=False),
    "gemma": DecoderSpec(
        **SMALL, **ALTERNATE, heads=4, kv_heads=2, head_width=8, rope=RopeSpec(theta=1e4, scaling="linear", factor=8.0),
        local_rope=RopeSpec(theta=100.0), activation="gelu_tanh", norm_offset=True, sandwich=True, embed_scale=4.9,
        qk_norm=True, attention_scale=0.4, attention_softcap=1.5, logit_softcap=2.0,
    ),
    "gpt-oss": DecoderSpec(
        **SMALL, **ALTERNATE, heads=4, kv_heads=4, head_width=6, rope=YARN.model_copy(update={"truncate": False}),
        activation="clipped_swiglu", qkv_bias=True, o_bias=True, mlp_bias=True, sinks=True,
    ),
    "nope": DecoderSpec(
        **SMALL, heads=3, kv_heads=1, head_width=8, unrotated=(False, True, False),
        rope=RopeSpec(theta=500.0, scaling="llama3", factor=8.0, original=32),
    ),
    "latent": DecoderSpec(
        **SMALL, heads=4, kv_heads=4, head_width=8, rope=YARN, attention_scale=0.5,
        mla=MLASpec(q_rank=10, kv_rank=12, nope_width=6, rope_width=4, value_width=5),
    ),
    "latent-windowed": DecoderSpec(
        **SMALL, heads=4, kv_heads=4, head_width=8, window=3, windowed=(True,) * 3, sinks=True,
        mla=MLASpec(kv_rank=12, nope_width=3, rope_width=2, value_width=6),
    ),
}  # fmt: skip


def drawn(spec: DecoderSpec) -> Params:
    """Parameters that are all random, so that a norm, bias or sink that is left out shows."""
    params, key = init(ModelDef(spec), jax.random.key(0)), jax.random.key(1)

    def moved(path: Any, x: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(str(path).encode()) % 2**31), x.shape)
        return x + 0.3 * noise if np.ptp(x) == 0 else x

    return jax.tree_util.tree_map_with_path(moved, params)


@lru_cache
def frequency(rope: RopeSpec, width: int) -> np.ndarray:
    """Angle per position of each pair, stretched; yarn's ramp by solving for its ends on a fine grid."""
    f = rope.theta ** (-2 * np.arange(width // 2) / width)
    if rope.scaling == "linear":
        return f / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original * f / (2 * np.pi)
        share = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
        return (1 - share) * f / rope.factor + share * f
    if rope.scaling == "yarn":
        grid = np.linspace(0, width, 2_000_001)
        turns = rope.original * rope.theta ** (-2 * grid / width) / (2 * np.pi)
        first, last = (grid[np.abs(turns - beta).argmin()] for beta in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        ramp = np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
        return f * (1 - ramp) + f / rope.factor * ramp
    return f


def turned(x_F: np.ndarray, position: int, rope: RopeSpec) -> np.ndarray:
    """Turn the pairs (i, i + F/2) by position * frequency, as complex numbers."""
    half = len(x_F) // 2
    z = (x_F[:half] + 1j * x_F[half:]) * np.exp(1j * position * frequency(rope, len(x_F)))
    return rope.magnitude * np.concatenate([z.real, z.imag])


def row_norm(spec: DecoderSpec, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * (weight + spec.norm_offset)


def product(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[name] + w.get(f"{name}_bias", 0.0)


def heads_of(
    spec: DecoderSpec, w: dict[str, np.ndarray], h_TD: np.ndarray, rope: RopeSpec | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values `[T, H, F]`, one of each for every query head."""
    T, H = len(h_TD), spec.heads

    def turn(x_THF: np.ndarray) -> np.ndarray:
        if rope is None:
            return x_THF
        return np.array([[turned(x_THF[t, h], t, rope) for h in range(x_THF.shape[1])] for t in range(T)])

    if spec.mla is not None:
        nope, rank = spec.mla.nope_width, spec.mla.kv_rank
        q = h_TD @ w["q"] if "q" in w else row_norm(spec, h_TD @ w["q_a"], w["q_a_norm"]) @ w["q_b"]
        latent = h_TD @ w["kv_a"]
        kv = (row_norm(spec, latent[:, :rank], w["kv_a_norm"]) @ w["kv_b"]).reshape(T, H, -1)
        q, k_rope = q.reshape(T, H, -1), turn(latent[:, None, rank:])
        k = np.concatenate([kv[..., :nope], np.repeat(k_rope, H, axis=1)], axis=-1)
        return np.concatenate([q[..., :nope], turn(q[..., nope:])], axis=-1), k, kv[..., nope:]
    q, k, v = (product(w, name, h_TD).reshape(T, -1, spec.head_width) for name in "qkv")
    if spec.qk_norm:
        q, k = row_norm(spec, q, w["q_norm"]), row_norm(spec, k, w["k_norm"])
    shared = H // spec.kv_heads
    return turn(q), np.repeat(turn(k), shared, axis=1), np.repeat(v, shared, axis=1)


def attended(
    spec: DecoderSpec, w: dict[str, np.ndarray], q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None
) -> np.ndarray:
    """What each head of each token gathers, `[T, H * F]`."""
    T, H, F = q.shape
    out = np.zeros((T, H, v.shape[-1]))
    for t in range(T):
        for h in range(H):
            first = 0 if window is None else max(t - window + 1, 0)
            score = k[first : t + 1, h] @ q[t, h] * (spec.attention_scale or F**-0.5)
            if spec.attention_softcap is not None:
                score = spec.attention_softcap * np.tanh(score / spec.attention_softcap)
            weight = np.exp(score)
            total = weight.sum() + (np.exp(w["sinks"][h]) if spec.sinks else 0)
            out[t, h] = weight / total @ v[first : t + 1, h]
    return out.reshape(T, -1)


def mlp(spec: DecoderSpec, w: dict[str, np.ndarray], h_TD: np.ndarray) -> np.ndarray:
    gate, up = product(w, "gate", h_TD), product(w, "up", h_TD)
    if spec.activation == "clipped_swiglu":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        gate = gate / (1 + np.exp(-1.702 * gate))
    elif spec.activation == "gelu_tanh":
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    else:
        gate = gate / (1 + np.exp(-gate))
    return product(w, "down", gate * up)


def by_hand(spec: DecoderSpec, params: Params, token_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and logits of one row, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x_TD = p["embed"][token_T] * spec.embed_scale
    for n in range(spec.layers):
        w = {name: a[n] for name, a in p["layers"].items()}
        windowed, unrotated = bool(spec.windowed) and spec.windowed[n], bool(spec.unrotated) and spec.unrotated[n]
        rope = None if unrotated else (spec.local_rope if windowed and spec.local_rope is not None else spec.rope)
        q, k, v = heads_of(spec, w, row_norm(spec, x_TD, w["attn_norm"]), rope)
        h_TD = product(w, "o", attended(spec, w, q, k, v, spec.window if windowed else None))
        x_TD = x_TD + (row_norm(spec, h_TD, w["post_attn_norm"]) if spec.sandwich else h_TD)
        h_TD = mlp(spec, w, row_norm(spec, x_TD, w["mlp_norm"]))
        x_TD = x_TD + (row_norm(spec, h_TD, w["post_mlp_norm"]) if spec.sandwich else h_TD)
    hidden_TD = row_norm(spec, x_TD, p["norm"])
    z_TV = hidden_TD @ p["embed" if spec.tied else "head"].T
    cap = spec.logit_softcap
    return hidden_TD, z_TV if cap is None else cap * np.tanh(z_TV / cap)
