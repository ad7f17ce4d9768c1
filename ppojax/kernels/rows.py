"""The mathematics of one tile of logits, row by row: statistics, and the gradient of all of them in one expression.

With p the policy's distribution, q the reference's, and g, h, a, b, c, t_k the cotangents of logp, entropy, KL(p||q),
KL(q||p), TV and the top-K log-probabilities,

    d loss / d z_v = p_v ( -g - sum_k t_k - h (log p_v + H) + a (log p_v/q_v - KL(p||q)) + b
                           + c/2 (sign(p_v - q_v) - E_p[sign(p - q)]) )
                     - b q_v + g 1[v = target] + sum_k t_k 1[v = id_k]

so one sweep over a tile serves every statistic, given a few numbers a row: `Residuals`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppojax.types import TokenStats


class Ask(NamedTuple):
    """Which statistics are computed, besides logp."""

    entropy: bool = False
    kl: bool = False
    reverse_kl: bool = False
    tv: bool = False

    @property
    def reference(self) -> bool:
        """Whether any of them compares with a reference."""
        return self.kl or self.reverse_kl or self.tv


@dataclass(frozen=True)
class Split:
    """How the vocabulary is split: over a mesh axis (inside `shard_map`), or not at all."""

    axis: str | None = None

    def max(self, x: jax.Array) -> jax.Array:
        """Maximum over the parts."""
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum over the parts."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def local(self, id_N: jax.Array, width: int) -> jax.Array:
        """Places of ids in this part of `width` words; -1 where they lie in another part or are no words."""
        start = jnp.int32(0) if self.axis is None else jax.lax.axis_index(self.axis) * width
        place = id_N.astype(jnp.int32) - start
        return jnp.where((id_N >= 0) & (place >= 0) & (place < width), place, -1)


WHOLE = Split()


class Residuals(NamedTuple):
    """What the backward needs of a row, beside its logits; None where it was not asked for."""

    lse: Any
    lse_reference: Any
    entropy: Any
    kl: Any
    sign: Any  # E_p[sign(p - q)]


def divergence(p: jax.Array, q: jax.Array, gap: jax.Array) -> jax.Array:
    """The terms of KL(p||q) with gap = log p/q, each at least 0: p gap - p + q, whose last two sum to nothing.

    Where p and q nearly agree the three cancel, and their series p (gap^2/2 - gap^3/6 + ...) stands in.
    """
    series = jnp.square(gap) * (0.5 - gap * (1 / 6 - gap * (1 / 24 - gap / 120)))
    return jnp.where(jnp.abs(gap) < 0.1, p * series, p * gap - p + q)


def side(gap: jax.Array) -> jax.Array:
    """sign(p - q), from gap = log p/q; 0 where only the rounding of logits of order 10 tells the two apart."""
    return jnp.where(jnp.abs(gap) < 2e-6, 0.0, jnp.sign(gap))


def _pick(x_nV: jax.Array, place_nK: jax.Array) -> jax.Array:
    """Values at places of each row; 0 where the place is -1."""
    found_nK = jnp.take_along_axis(x_nV, jnp.maximum(place_nK, 0), axis=-1)
    return jnp.where(place_nK >= 0, found_nK, 0.0)


def _normalise(z_nV: jax.Array, split: Split) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logits below the row's maximum, their exponentials, those's sum, and the maximum."""
    max_n = split.max(jnp.max(z_nV, axis=-1))
    shifted_nV = z_nV - max_n[:, None]
    exp_nV = jnp.exp(shifted_nV)
    return shifted_nV, exp_nV, split.sum(jnp.sum(exp_nV, axis=-1)), max_n


def statistics(
    z_nV: jax.Array,
    y_nV: jax.Array | None,
    target_n: jax.Array,
    id_nK: jax.Array | None,
    ask: Ask,
    split: Split = WHOLE,
) -> tuple[TokenStats, Residuals]:
    """Statistics of rows of float32 logits `z` (the policy's) and `y` (the reference's).

    Everything is taken relative to the rows' maxima, so that nothing cancels when logits are large.
    """
    width = z_nV.shape[-1]
    shifted_nV, exp_nV, total_n, max_n = _normalise(z_nV, split)
    log_total_n = jnp.log(total_n)
    place_n1 = split.local(target_n, width)[:, None]
    logp_n = split.sum(_pick(shifted_nV, place_n1)[:, 0]) - log_total_n
    entropy_n = log_total_n - split.sum(jnp.sum(exp_nV * shifted_nV, axis=-1)) / total_n if ask.entropy else None
    topk_nK = None
    if id_nK is not None:
        topk_nK = split.sum(_pick(shifted_nV, split.local(id_nK, width))) - log_total_n[:, None]
        topk_nK = jnp.where(id_nK >= 0, topk_nK, 0.0)
    kl_n = reverse_n = tv_n = sign_n = lse_reference_n = None
    if ask.reference:
        assert y_nV is not None
        other_nV, other_exp_nV, other_total_n, other_max_n = _normalise(y_nV, split)
        lse_reference_n = other_max_n + jnp.log(other_total_n)
        p_nV, q_nV = exp_nV / total_n[:, None], other_exp_nV / other_total_n[:, None]
        gap_nV = (shifted_nV - log_total_n[:, None]) - (other_nV - jnp.log(other_total_n)[:, None])
        if ask.kl:
            kl_n = split.sum(jnp.sum(divergence(p_nV, q_nV, gap_nV), axis=-1))
        if ask.reverse_kl:
            reverse_n = split.sum(jnp.sum(divergence(q_nV, p_nV, -gap_nV), axis=-1))
        if ask.tv:
            tv_n = 0.5 * split.sum(jnp.sum(jnp.abs(p_nV - q_nV), axis=-1))
            sign_n = split.sum(jnp.sum(p_nV * side(gap_nV), axis=-1))
    stats = TokenStats(logp_n, entropy_n, kl_n, reverse_n, tv_n, topk_nK)
    return stats, Residuals(max_n + log_total_n, lse_reference_n, entropy_n, kl_n, sign_n)


def gradient(
    z_nV: jax.Array,
    y_nV: jax.Array | None,
    target_n: jax.Array,
    id_nK: jax.Array | None,
    residuals: Residuals,
    cotangent: Any,
    ask: Ask,
    split: Split = WHOLE,
) -> jax.Array:
    """d loss / d z, `[n, V]` float32: the expression at the top of this file."""
    logp_nV = z_nV - residuals.lse[:, None]
    p_nV = jnp.exp(logp_nV)
    d_logp_n = cotangent.logp
    minus_n = (
        d_logp_n if id_nK is None else d_logp_n + jnp.sum(jnp.where(id_nK >= 0, cotangent.topk_logp, 0.0), axis=-1)
    )
    bracket_nV = jnp.broadcast_to(-minus_n[:, None], logp_nV.shape)
    if ask.entropy:
        bracket_nV = bracket_nV - cotangent.entropy[:, None] * (logp_nV + residuals.entropy[:, None])
    q_nV = None
    if ask.reference:
        assert y_nV is not None
        log_q_nV = y_nV - residuals.lse_reference[:, None]
        q_nV = jnp.exp(log_q_nV)
        if ask.kl:
            bracket_nV = bracket_nV + cotangent.kl[:, None] * (logp_nV - log_q_nV - residuals.kl[:, None])
        if ask.reverse_kl:
            bracket_nV = bracket_nV + cotangent.reverse_kl[:, None]
        if ask.tv:
            sign_nV = side(logp_nV - log_q_nV) - residuals.sign[:, None]
            bracket_nV = bracket_nV + (0.5 * cotangent.tv)[:, None] * sign_nV
    place_n = split.local(target_n, z_nV.shape[-1])
    hit_nV = jax.lax.broadcasted_iota(jnp.int32, z_nV.shape, 1) == place_n[:, None]
    d_z_nV = jnp.where(hit_nV, d_logp_n[:, None], 0.0) + p_nV * bracket_nV
    if ask.reverse_kl:
        d_z_nV = d_z_nV - cotangent.reverse_kl[:, None] * q_nV
    if id_nK is not None:
        place_nK = split.local(id_nK, z_nV.shape[-1])
        d_nK = jnp.where(place_nK >= 0, cotangent.topk_logp, 0.0)
        d_z_nV = d_z_nV.at[jnp.arange(z_nV.shape[0])[:, None], jnp.maximum(place_nK, 0)].add(d_nK)
    return d_z_nV
