"""The mathematics of one tile of logits: statistics, and the gradient of all of them in one expression.

With p the policy's distribution, q the reference's, and g, h, a, b, c, t_k the cotangents of logp, entropy, KL(p||q),
KL(q||p), TV and the top-K log-probabilities,

    d loss / d z_v = p_v ( -g - sum_k t_k - h (log p_v + H) + a (log p_v/q_v - KL(p||q)) + b
                           + c/2 (sign(p_v - q_v) - E_p[sign(p - q)]) )
                     - b q_v + g 1[v = target] + sum_k t_k 1[v = id_k]

so one sweep over a tile serves every statistic, given a few numbers a row: `Residuals`. The sweeps are in
`ppojax.kernels.sweeps`; here they are put together, over the parts of a split vocabulary too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppojax.kernels.sweeps import Ask, Line, Normal, Slope, Sweeps
from ppojax.types import TokenStats


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

    def outside(self, id_N: jax.Array, width: int) -> jax.Array:
        """Ids that are no words of any part."""
        parts = 1 if self.axis is None else jax.lax.psum(1, self.axis)
        return (id_N < 0) | (id_N >= width * parts)

    def local(self, id_N: jax.Array, width: int) -> jax.Array:
        """Places of ids in this part of `width` words; -1 where they lie in another part or are no words."""
        start = jnp.int32(0) if self.axis is None else jax.lax.axis_index(self.axis) * width
        return jnp.where(id_N >= 0, within(id_N.astype(jnp.int32) - start, width), -1)


WHOLE = Split()


def within(place_N: jax.Array, width: int) -> jax.Array:
    """Places from 0 below `width`; others become -1."""
    return jnp.where((place_N >= 0) & (place_N < width), place_N, -1)


class Residuals(NamedTuple):
    """What the backward needs of a row, beside its logits; None where it was not asked for."""

    normal: Normal
    other: Normal | None  # the reference's
    entropy: Any
    kl: Any
    side: Any  # E_p[sign(p - q)]


def _pick(x_nV: jax.Array, place_nK: jax.Array) -> jax.Array:
    """Values at places of each row; 0 where the place is -1."""
    found_nK = jnp.take_along_axis(x_nV, jnp.maximum(place_nK, 0), axis=-1)
    return jnp.where(place_nK >= 0, found_nK, 0.0)


def _log_probability(z_nV: jax.Array, id_nK: jax.Array, normal: Normal, split: Split) -> jax.Array:
    """Log-probabilities of words by their ids, wherever they lie; minus the log-sum-exp where an id is no word."""
    width = z_nV.shape[-1]
    place_nK = split.local(id_nK, width)
    shifted_nK = jnp.where(place_nK >= 0, _pick(z_nV, place_nK) - normal.max[:, None], 0.0)
    below_nK = jnp.where(split.outside(id_nK, width), -normal.max[:, None], split.sum(shifted_nK))
    return below_nK - normal.log_total[:, None]


def _normalise(z_nV: jax.Array, sweeps: Sweeps, split: Split, *, entropy: bool) -> tuple[Normal, jax.Array | None]:
    """The row's normaliser over all parts, and its entropy where that is asked for."""
    part = sweeps.mass(z_nV, weighted=entropy)
    max_n = split.max(part.max)
    below_n = part.max - max_n  # of this part's maximum below the row's
    scale_n = jnp.exp(below_n)
    total_n = split.sum(part.total * scale_n)
    normal = Normal(max_n, jnp.log(total_n))
    if part.weighted is None:
        return normal, None
    weighted_n = split.sum(scale_n * (part.weighted + below_n * part.total))
    return normal, normal.log_total - weighted_n / total_n


def statistics(
    z_nV: jax.Array,
    y_nV: jax.Array | None,
    target_n: jax.Array,
    id_nK: jax.Array | None,
    ask: Ask,
    sweeps: Sweeps,
    split: Split = WHOLE,
) -> tuple[TokenStats, Residuals]:
    """Statistics of rows of float32 logits `z` (the policy's) and `y` (the reference's).

    Everything is taken relative to the rows' maxima, so that nothing cancels when logits are large.
    """
    normal, entropy_n = _normalise(z_nV, sweeps, split, entropy=ask.entropy)
    stats = TokenStats(_log_probability(z_nV, target_n[:, None], normal, split)[:, 0], entropy_n)
    if id_nK is not None:
        logp_nK = _log_probability(z_nV, id_nK, normal, split)
        stats = stats._replace(topk_logp=jnp.where(id_nK >= 0, logp_nK, 0.0))
    if not ask.reference:
        return stats, Residuals(normal, None, entropy_n, None, None)
    assert y_nV is not None
    other, _ = _normalise(y_nV, sweeps, split, entropy=False)
    gaps = jax.tree.map(split.sum, sweeps.gaps(z_nV, y_nV, normal, other, ask=ask))
    tv_n = None if gaps.tv is None else 0.5 * gaps.tv
    stats = stats._replace(kl=gaps.kl, reverse_kl=gaps.reverse_kl, tv=tv_n)
    return stats, Residuals(normal, other, entropy_n, gaps.kl, gaps.side)


def line(id_nK: jax.Array | None, residuals: Residuals, cotangent: Any, ask: Ask) -> Line:
    """Gather what of a row's gradient does not depend on the word."""
    constant_n = -cotangent.logp
    if id_nK is not None:
        constant_n = constant_n - jnp.sum(jnp.where(id_nK >= 0, cotangent.topk_logp, 0.0), axis=-1)
    line = Line(cotangent.logp, constant_n)
    if ask.entropy:
        line = line._replace(entropy=-cotangent.entropy, constant=line.constant - cotangent.entropy * residuals.entropy)
    if ask.kl:
        line = line._replace(kl=cotangent.kl, constant=line.constant - cotangent.kl * residuals.kl)
    if ask.reverse_kl:
        line = line._replace(reverse_kl=cotangent.reverse_kl, constant=line.constant + cotangent.reverse_kl)
    if ask.tv:
        half_n = 0.5 * cotangent.tv
        line = line._replace(tv=half_n, constant=line.constant - half_n * residuals.side)
    return line


def gradient(
    z_nV: jax.Array,
    y_nV: jax.Array | None,
    residuals: Residuals,
    line: Line,
    place_n: jax.Array,
    topk: tuple[jax.Array, jax.Array] | None,
    sweeps: Sweeps,
    slope: Slope,
    dtype: jnp.dtype,
) -> jax.Array:
    """d loss / d x of the head's product x, in `dtype`: the expression at the top of this file times dz/dx.

    The words may be some of the row's only: a row's numbers hold for all of them. `place` is the target's column among
    these words, or -1; `topk` holds such columns of the top-K, and their cotangents.
    """
    d_x_nV = sweeps.gradient(z_nV, y_nV, residuals.normal, residuals.other, line, place_n, slope=slope, dtype=dtype)
    if topk is None:
        return d_x_nV
    place_nK, cotangent_nK = topk
    d_nK = jnp.where(place_nK >= 0, cotangent_nK, 0.0) * slope(_pick(z_nV, place_nK))
    row_n1 = jnp.arange(z_nV.shape[0])[:, None]
    return d_x_nV.at[row_n1, jnp.maximum(place_nK, 0)].add(d_nK.astype(dtype))
