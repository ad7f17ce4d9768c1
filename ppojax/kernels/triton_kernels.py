"""What `ppojax.kernels.triton` runs on the GPU: the three passes, one piece of one row a program.

The formulas are those of `ppojax.kernels.sweeps`, in Triton's language; the tests hold one to the other.
"""

# Pyright takes the module beside this one for the package `triton`.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

from typing import no_type_check  # the tests' type checks stay out of code that Triton compiles

import triton
import triton.language as tl

SUMS = 4  # numbers that a piece may leave
NUMBERS = 10  # numbers of a row: max and log_total of policy and reference, and the fields of `Line`


@triton.jit
@no_type_check
def _piece(PIECES: tl.constexpr, WORDS: tl.constexpr):
    """The row, in 64 bits since rows times words may need them, and the columns of this program's words."""
    block = tl.program_id(0)
    return (block // PIECES).to(tl.int64), (block % PIECES) * WORDS + tl.arange(0, WORDS)


@triton.jit
@no_type_check
def _log_softmax(z, numbers_ptr, row, FIRST: tl.constexpr, NUMBERS: tl.constexpr):
    numbers = numbers_ptr + row * NUMBERS + FIRST
    return (z - tl.load(numbers)) - tl.load(numbers + 1)


@triton.jit
@no_type_check
def _divergence(p, q, gap):
    """See `sweeps.divergence`."""
    series = gap * gap * (0.5 - gap * (1 / 6 - gap * (1 / 24 - gap * (1 / 120))))
    return tl.where(tl.abs(gap) < 0.1, p * series, p * gap - p + q)


@triton.jit
@no_type_check
def _side(gap):
    """See `sweeps.side`."""
    return tl.where(tl.abs(gap) < 2e-6, 0.0, tl.where(gap > 0, 1.0, -1.0))


@triton.jit
@no_type_check
def mass(
    z_ptr, sums_ptr, VOCABULARY: tl.constexpr, PIECES: tl.constexpr, WORDS: tl.constexpr, SUMS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The maximum of a piece, the sum of exponentials relative to it, and their weighted sum."""
    row, column = _piece(PIECES, WORDS)
    inside = column < VOCABULARY
    z = tl.load(z_ptr + row * VOCABULARY + column, mask=inside, other=-1e38)  # nothing, and 0 times it is no NaN
    top = tl.max(z, 0)
    exp = tl.exp(z - top)
    sums_ptr += tl.program_id(0) * SUMS
    tl.store(sums_ptr, top)
    tl.store(sums_ptr + 1, tl.sum(exp, 0))
    if WEIGHTED:
        tl.store(sums_ptr + 2, tl.sum(exp * (z - top), 0))


@triton.jit
@no_type_check
def gaps(
    z_ptr, y_ptr, numbers_ptr, sums_ptr, VOCABULARY: tl.constexpr, PIECES: tl.constexpr, WORDS: tl.constexpr,
    SUMS: tl.constexpr, NUMBERS: tl.constexpr, KL: tl.constexpr, REVERSE_KL: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """The terms of `Gaps`, summed over a piece."""
    row, column = _piece(PIECES, WORDS)
    inside = column < VOCABULARY
    z = tl.load(z_ptr + row * VOCABULARY + column, mask=inside, other=0.0)
    y = tl.load(y_ptr + row * VOCABULARY + column, mask=inside, other=0.0)
    logp = _log_softmax(z, numbers_ptr, row, 0, NUMBERS)
    log_q = _log_softmax(y, numbers_ptr, row, 2, NUMBERS)
    p, q, gap = tl.exp(logp), tl.exp(log_q), logp - log_q
    sums_ptr += tl.program_id(0) * SUMS
    if KL:
        tl.store(sums_ptr, tl.sum(tl.where(inside, _divergence(p, q, gap), 0.0), 0))
    if REVERSE_KL:
        tl.store(sums_ptr + 1, tl.sum(tl.where(inside, _divergence(q, p, -gap), 0.0), 0))
    if TV:
        tl.store(sums_ptr + 2, tl.sum(tl.where(inside, tl.abs(p - q), 0.0), 0))
        tl.store(sums_ptr + 3, tl.sum(tl.where(inside, p * _side(gap), 0.0), 0))


@triton.jit
@no_type_check
def gradient(
    z_ptr, y_ptr, numbers_ptr, place_ptr, d_ptr, VOCABULARY: tl.constexpr, PIECES: tl.constexpr, WORDS: tl.constexpr,
    NUMBERS: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, TV: tl.constexpr,
    REVERSE_KL: tl.constexpr, PER_TEMPERATURE: tl.constexpr, PER_CAP: tl.constexpr,
):  # fmt: skip
    """The expression of `Line` times `Slope`: PER_TEMPERATURE (1 - (PER_CAP z)^2)."""
    row, column = _piece(PIECES, WORDS)
    inside = column < VOCABULARY
    z = tl.load(z_ptr + row * VOCABULARY + column, mask=inside, other=0.0)
    logp = _log_softmax(z, numbers_ptr, row, 0, NUMBERS)
    line = numbers_ptr + row * NUMBERS + 4
    bracket = tl.load(line + 1)
    if ENTROPY:
        bracket = bracket + tl.load(line + 2) * logp
    if REFERENCE:
        y = tl.load(y_ptr + row * VOCABULARY + column, mask=inside, other=0.0)
        log_q = _log_softmax(y, numbers_ptr, row, 2, NUMBERS)
        if KL:
            bracket = bracket + tl.load(line + 3) * (logp - log_q)
        if TV:
            bracket = bracket + tl.load(line + 4) * _side(logp - log_q)
    d = tl.exp(logp) * bracket + tl.where(column == tl.load(place_ptr + row), tl.load(line), 0.0)
    if REVERSE_KL:
        d = d - tl.load(line + 5) * tl.exp(log_q)
    if PER_CAP != 0.0:
        d = d * (1.0 - (z * PER_CAP) * (z * PER_CAP))
    d = d * PER_TEMPERATURE
    tl.store(d_ptr + row * VOCABULARY + column, d.to(d_ptr.dtype.element_ty), mask=inside)
