"""Passes over a tile of logits, row by row: all that touches every word. Written here for XLA.

`rows` makes the statistics and their gradient out of these three, whoever runs them: the Pallas and Triton kernels are
other `Sweeps`. Each returns sums over the words it was given, so that a vocabulary in parts needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


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


class Mass(NamedTuple):
    """The exponentials of a row's logits, relative to its maximum."""

    max: jax.Array  # max_v z_v
    total: jax.Array  # sum_v exp(z_v - max)
    weighted: jax.Array | None  # sum_v exp(z_v - max) (z_v - max), for the entropy


class Normal(NamedTuple):
    """What turns a row's logits into log-probabilities: log p_v = (z_v - max) - log_total.

    In this order: the difference of large logits is exact, that of a logit and a large log-sum-exp is not.
    """

    max: Any
    log_total: Any


class Gaps(NamedTuple):
    """Sums that compare the policy p with the reference q; None where they are not asked for."""

    kl: Any = None  # terms of KL(p || q)
    reverse_kl: Any = None  # terms of KL(q || p)
    tv: Any = None  # |p - q|, twice the total variation
    side: Any = None  # p sign(p - q)


class Slope(NamedTuple):
    """How logits were made of the head's product x: z = softcap tanh(x / softcap) / temperature (static)."""

    temperature: float
    softcap: float | None

    def __call__(self, z: jax.Array) -> jax.Array | float:
        """dz / dx, in terms of z."""
        if self.softcap is None:
            return 1.0 / self.temperature
        return (1.0 - jnp.square(z * (self.temperature / self.softcap))) * (1.0 / self.temperature)


class Line(NamedTuple):
    """A row's numbers in the gradient, float32 `[n]`; None where nothing asks for them.

    d loss / d z_v = p_v (constant + entropy log p_v + kl log(p_v / q_v) + tv sign(p_v - q_v))
                     - reverse_kl q_v + logp 1[v = target]
    """

    logp: Any
    constant: Any
    entropy: Any = None
    kl: Any = None
    tv: Any = None
    reverse_kl: Any = None


@runtime_checkable
class Sweeps(Protocol):
    """The passes, of float32 logits `z` (the policy's) and `y` (the reference's), `[n, V]`; hashable."""

    def refusal(self, vocabulary: int) -> str | None:
        """Why these passes cannot take rows of so many words; None where they can."""
        ...

    def mass(self, z_nV: jax.Array, *, weighted: bool) -> Mass:
        """Maximum, sum of exponentials and, where asked for, their weighted sum."""
        ...

    def gaps(self, z_nV: jax.Array, y_nV: jax.Array, normal: Normal, other: Normal, *, ask: Ask) -> Gaps:
        """Sums over the words that compare the two distributions."""
        ...

    def gradient(
        self,
        z_nV: jax.Array,
        y_nV: jax.Array | None,
        normal: Normal,
        other: Normal | None,
        line: Line,
        place_n: jax.Array,
        *,
        slope: Slope,
        dtype: jnp.dtype,
    ) -> jax.Array:
        """d loss / d x of `Line` times `Slope`, `[n, V]` in `dtype`; `place` is the target's column, or -1."""
        ...


def divergence(p: jax.Array, q: jax.Array, gap: jax.Array) -> jax.Array:
    """The terms of KL(p||q) with gap = log p/q, each at least 0: p gap - p + q, whose last two sum to nothing.

    Where p and q nearly agree the three cancel, and their series p (gap^2/2 - gap^3/6 + ...) stands in.
    """
    series = gap * gap * (0.5 - gap * (1 / 6 - gap * (1 / 24 - gap * (1 / 120))))
    return jnp.where(jnp.abs(gap) < 0.1, p * series, p * gap - p + q)


def side(gap: jax.Array) -> jax.Array:
    """sign(p - q), from gap = log p/q; 0 where only the rounding of logits of order 10 tells the two apart."""
    # Not jnp.sign, which asks what kind of TPU there is even where a program is only lowered for one.
    return jnp.where(jnp.abs(gap) < 2e-6, 0.0, jnp.where(gap > 0, 1.0, -1.0))


def gap_terms(logp: jax.Array, log_q: jax.Array, ask: Ask) -> Gaps:
    """What `Gaps` sums, element by element; every implementation uses it."""
    p, q, gap = jnp.exp(logp), jnp.exp(log_q), logp - log_q
    return Gaps(
        kl=divergence(p, q, gap) if ask.kl else None,
        reverse_kl=divergence(q, p, -gap) if ask.reverse_kl else None,
        tv=jnp.abs(p - q) if ask.tv else None,
        side=p * side(gap) if ask.tv else None,
    )


def gradient_terms(logp: jax.Array, log_q: jax.Array | None, line: Line, hit: jax.Array) -> jax.Array:
    """The expression of `Line`, element by element, for numbers that broadcast against `logp`; likewise."""
    p = jnp.exp(logp)
    bracket = line.constant
    if line.entropy is not None:
        bracket = bracket + line.entropy * logp
    if log_q is not None:
        gap = logp - log_q
        if line.kl is not None:
            bracket = bracket + line.kl * gap
        if line.tv is not None:
            bracket = bracket + line.tv * side(gap)
    d_z = p * bracket + jnp.where(hit, line.logp, 0.0)
    if line.reverse_kl is not None and log_q is not None:
        d_z = d_z - line.reverse_kl * jnp.exp(log_q)
    return d_z


def log_softmax(z_nV: jax.Array, normal: Normal) -> jax.Array:
    """Log-probabilities of a row's words."""
    return (z_nV - normal.max[:, None]) - normal.log_total[:, None]


@dataclass(frozen=True)
class XLASweeps:
    """The passes as XLA fuses them."""

    def refusal(self, vocabulary: int) -> str | None:
        """See `Sweeps.refusal`: they take all."""
        return None

    def mass(self, z_nV: jax.Array, *, weighted: bool) -> Mass:
        """See `Sweeps.mass`."""
        max_n = jnp.max(z_nV, axis=-1)
        shifted_nV = z_nV - max_n[:, None]
        exp_nV = jnp.exp(shifted_nV)
        return Mass(max_n, jnp.sum(exp_nV, axis=-1), jnp.sum(exp_nV * shifted_nV, axis=-1) if weighted else None)

    def gaps(self, z_nV: jax.Array, y_nV: jax.Array, normal: Normal, other: Normal, *, ask: Ask) -> Gaps:
        """See `Sweeps.gaps`."""
        terms = gap_terms(log_softmax(z_nV, normal), log_softmax(y_nV, other), ask)
        return jax.tree.map(lambda x: jnp.sum(x, axis=-1), terms)

    def gradient(
        self,
        z_nV: jax.Array,
        y_nV: jax.Array | None,
        normal: Normal,
        other: Normal | None,
        line: Line,
        place_n: jax.Array,
        *,
        slope: Slope,
        dtype: jnp.dtype,
    ) -> jax.Array:
        """See `Sweeps.gradient`."""
        log_q_nV = None if y_nV is None or other is None else log_softmax(y_nV, other)
        hit_nV = jax.lax.broadcasted_iota(jnp.int32, z_nV.shape, 1) == place_n[:, None]
        columns = jax.tree.map(lambda x: x[:, None], line)
        d_z_nV = gradient_terms(log_softmax(z_nV, normal), log_q_nV, columns, hit_nV)
        return (d_z_nV * slope(z_nV)).astype(dtype)


XLA = XLASweeps()
