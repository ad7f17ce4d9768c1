"""The passes as Pallas kernels for Hopper GPUs (Mosaic GPU), on logits that the library's matrix product made.

Every pass is bound by reading the logits. A forward tile has some 100 to 400 rows, too few to give 132 multiprocessors
equal work, so a row is cut into pieces and a block of 128 threads takes one piece: some 16,000 blocks a tile, several
at a time on each multiprocessor, which hides the latency of memory without a pipeline. No word is used twice: it goes
straight to registers, 16 bytes a load, with no stop in shared memory; and since a whole piece is in registers, its
maximum is found before the one exponential of each word is taken. A piece leaves a few sums in memory; XLA adds them
up over the row.

Interpreted, and lowered for CUDA at real shapes, by the tests; compiled for compute capability 9.0 (56 to 105
registers, nothing spilled). Run and timed on no device yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ppojax.kernels.sweeps import Ask, Gaps, Line, Mass, Normal, Slope, gap_terms, gradient_terms

_THREADS = 128  # a warpgroup, which is what Mosaic GPU calls a thread
# Words of a piece: 32 registers a thread, in one array of logits or in two, leave room for four blocks or more on a
# multiprocessor: 64 KiB under way there, where 25 KiB would do for 4.8 TB/s at a latency of 0.7 us.
_WORDS = 4096


class Cut(NamedTuple):
    """How rows of words are cut into pieces of equal size; the last begins early, where they do not divide the row."""

    rows: int
    vocabulary: int
    words: int

    @property
    def pieces(self) -> int:
        """Pieces a row."""
        return -(-self.vocabulary // self.words)

    @property
    def layout(self) -> Any:
        """Words over threads: neighbours go to one thread, as many as a load of 16 bytes has and alignment allows."""
        vector = math.gcd(4, self.vocabulary, self.words // _THREADS)
        return plgpu.Layout.WG_STRIDED((self.words,), vector)


class Piece(NamedTuple):
    """The piece of a row that a block works on."""

    cut: Cut
    row: jax.Array
    index: jax.Array

    @property
    def columns(self) -> Any:
        """Its place in the row."""
        start = jnp.minimum(self.index * self.cut.words, self.cut.vocabulary - self.cut.words)
        return pl.ds(start, self.cut.words)

    def load(self, ref: Any) -> jax.Array:
        """Its logits."""
        return plgpu.layout_cast(ref[self.row, self.columns], self.cut.layout)

    def column(self) -> jax.Array:
        """The column of each of its words."""
        offset = plgpu.broadcasted_iota(jnp.int32, (self.cut.words,), 0, layout=self.cut.layout)
        return self.columns.start + offset

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum over its words, less those that the piece before it has too."""
        return jnp.sum(jnp.where(self.column() >= self.index * self.cut.words, x, 0.0))

    def numbers(self, ref: Any, tree: Any) -> Any:
        """The row's numbers, as `_pack` took them."""
        return jax.tree.unflatten(tree, [ref[self.row, i] for i in range(tree.num_leaves)])


def _cut(z_nV: jax.Array, arrays: int) -> Cut:
    rows, vocabulary = z_nV.shape
    fit = min(_WORDS // arrays, vocabulary) // _THREADS
    return Cut(rows, vocabulary, _THREADS * 2 ** (fit.bit_length() - 1))


def _pack(*tree: Any) -> tuple[jax.Array, Any]:
    """The numbers of each row, one row of them after another, and how to tell them apart."""
    leaves, structure = jax.tree.flatten(tree)
    return jnp.stack(leaves, axis=-1), structure


@dataclass(frozen=True)
class MosaicSweeps:
    """The passes as Mosaic GPU runs them; `interpret` is `plgpu.InterpretGPUParams()` in tests, from jax 0.11 on."""

    interpret: Any = None

    def refusal(self, vocabulary: int) -> str | None:
        """See `Sweeps.refusal`."""
        return None if vocabulary >= _THREADS else f"takes no vocabulary of less than {_THREADS} words ({vocabulary})"

    def mass(self, z_nV: jax.Array, *, weighted: bool) -> Mass:
        """See `Sweeps.mass`."""
        cut = _cut(z_nV, arrays=1)

        def mass(z_ref: Any, sums_ref: Any) -> None:
            piece = self._piece(cut)
            z = piece.load(z_ref)
            top = jnp.max(z)
            exp = jnp.exp(z - top)
            sums_ref[0, piece.row, piece.index] = top
            sums_ref[1, piece.row, piece.index] = piece.sum(exp)
            if weighted:
                sums_ref[2, piece.row, piece.index] = piece.sum(exp * (z - top))

        sums = self._run(mass, cut, jax.ShapeDtypeStruct((2 + weighted, cut.rows, cut.pieces), jnp.float32), z_nV)
        max_n = jnp.max(sums[0], axis=-1)
        below_np = sums[0] - max_n[:, None]
        scale_np = jnp.exp(below_np)
        total_n = jnp.sum(scale_np * sums[1], axis=-1)
        return Mass(max_n, total_n, jnp.sum(scale_np * (sums[2] + below_np * sums[1]), axis=-1) if weighted else None)

    def gaps(self, z_nV: jax.Array, y_nV: jax.Array, normal: Normal, other: Normal, *, ask: Ask) -> Gaps:
        """See `Sweeps.gaps`."""
        cut = _cut(z_nV, arrays=2)
        numbers_nk, structure = _pack(normal, other)
        asked = jax.tree.structure(gap_terms(jnp.float32(0), jnp.float32(0), ask))

        def gaps(z_ref: Any, y_ref: Any, numbers_ref: Any, sums_ref: Any) -> None:
            piece = self._piece(cut)
            normal, other = piece.numbers(numbers_ref, structure)
            terms = gap_terms(_log_softmax(piece.load(z_ref), normal), _log_softmax(piece.load(y_ref), other), ask)
            for i, term in enumerate(jax.tree.leaves(terms)):
                sums_ref[i, piece.row, piece.index] = piece.sum(term)

        out = jax.ShapeDtypeStruct((asked.num_leaves, cut.rows, cut.pieces), jnp.float32)
        return jax.tree.unflatten(asked, jnp.sum(self._run(gaps, cut, out, z_nV, y_nV, numbers_nk), axis=-1))

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
        """See `Sweeps.gradient`.

        It does not write over `z`, though it could where `dtype` is float32: pieces of a row overlap, kept logits are
        needed afterwards, and it would save no traffic.
        """
        logits = (z_nV,) if y_nV is None or other is None else (z_nV, y_nV)
        cut = _cut(z_nV, arrays=len(logits))
        numbers_nk, structure = _pack(normal, other, line)

        def gradient(*refs: Any) -> None:
            *logit_refs, numbers_ref, place_ref, d_ref = refs
            piece = self._piece(cut)
            normal, other, line = piece.numbers(numbers_ref, structure)
            z, *y = (piece.load(ref) for ref in logit_refs)
            log_q = _log_softmax(y[0], other) if y else None
            d_z = gradient_terms(_log_softmax(z, normal), log_q, line, piece.column() == place_ref[piece.row])
            d_ref[piece.row, piece.columns] = (d_z * slope(z)).astype(dtype)

        out = jax.ShapeDtypeStruct(z_nV.shape, dtype)
        return self._run(gradient, cut, out, *logits, numbers_nk, place_n)

    def _piece(self, cut: Cut) -> Piece:
        block = jax.lax.axis_index("block")
        return Piece(cut, jax.lax.div(block, jnp.int32(cut.pieces)), jax.lax.rem(block, jnp.int32(cut.pieces)))

    def _run(self, body: Callable[..., None], cut: Cut, out: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        if cut.rows == 0:  # CUDA has no empty grids
            return jnp.zeros(out.shape, out.dtype)
        # One axis, since CUDA's other two end at 65,535.
        blocks = cut.rows * cut.pieces
        run = plgpu.kernel(body, out_type=out, grid=(blocks,), grid_names=("block",), interpret=self.interpret)
        return run(*arrays)


def _log_softmax(z: jax.Array, normal: Normal) -> jax.Array:
    return (z - normal.max) - normal.log_total


SWEEPS = MosaicSweeps()
