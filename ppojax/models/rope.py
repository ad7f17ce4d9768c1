"""Rotary positions, and the ways in which their frequencies are stretched for long contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ppojax.models.spec import RopeSpec

Turn = tuple[jax.Array, jax.Array]  # cos and sin, [B, T, width]


def frequencies(rope: RopeSpec, width: int) -> list[float]:
    """Angle per position of each pair (i, i + width/2): f_i = theta^(-2i/width), stretched as `rope` says.

    - linear: f / factor (arXiv 2306.15595).
    - llama3: by wavelength w = 2 pi / f. Over original / low it is f / factor, under original / high it is f, and
      between them it is (1 - s) f / factor + s f with s = (original / w - low) / (high - low) (Llama 3.1's model card).
    - yarn (arXiv 2309.00071, section 3.2): the pair that turns r times over the original length is
      d(r) = width ln(original / (2 pi r)) / (2 ln theta). Up to d(beta_fast) it is f, from d(beta_slow) on it is
      f / factor, and linear in i between the two.
    """
    plain = [rope.theta ** (-2.0 * i / width) for i in range(width // 2)]
    if rope.scaling == "linear":
        return [f / rope.factor for f in plain]
    if rope.scaling == "llama3":
        return [_llama3(f, rope) for f in plain]
    if rope.scaling == "yarn":
        return _yarn(plain, rope, width)
    return plain


def _llama3(f: float, rope: RopeSpec) -> float:
    turns = rope.original * f / (2 * math.pi)  # over the original length: original / wavelength
    if turns < rope.low:
        return f / rope.factor
    if turns > rope.high:
        return f
    smooth = (turns - rope.low) / (rope.high - rope.low)
    return (1 - smooth) * f / rope.factor + smooth * f


def _yarn(plain: list[float], rope: RopeSpec, width: int) -> list[float]:
    def pair(turns: float) -> float:
        return width * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = (last - first) or 0.001
    stretched = []
    for i, f in enumerate(plain):
        ramp = min(max((i - first) / span, 0.0), 1.0)
        stretched.append(f / rope.factor * ramp + f * (1 - ramp))
    return stretched


def rotary(position_BT: jax.Array, width: int, rope: RopeSpec) -> Turn:
    """cos and sin of position * frequency, each angle twice ("rotate half" layout; RoFormer, arXiv 2104.09864).

    Under yarn both carry `rope.magnitude`, so that scores carry its square.
    """
    inverse = jnp.asarray(frequencies(rope, width), jnp.float32)
    angle = position_BT.astype(jnp.float32)[..., None] * inverse[None, None, :]
    angle = jnp.concatenate([angle, angle], axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if rope.magnitude == 1.0 else (cos * rope.magnitude, sin * rope.magnitude)


def rotate(x_BTHF: jax.Array, turn: Turn) -> jax.Array:
    """Apply rotary positions to every head, in float32."""
    cos_BTF, sin_BTF = turn
    x = x_BTHF.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos_BTF[:, :, None, :] + turned * sin_BTF[:, :, None, :]).astype(x_BTHF.dtype)
