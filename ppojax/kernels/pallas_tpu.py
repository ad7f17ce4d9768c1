"""The passes over a tile's logits as Pallas kernels for TPUs.

The grid is blocks of rows times blocks of words, the words innermost: a row's sums stay in VMEM while its words pass
by, so a pass reads the logits once and writes a few numbers a row. The gradient is written over the logits where it
has their type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ppojax.kernels.sweeps import Ask, Gaps, Line, Mass, Normal, Slope, gap_terms, gradient_terms

# A block of float32 logits is 1 MiB: long enough a copy to hide the cost of a step of the grid, and with two buffers
# each of policy, reference and gradient well inside VMEM.
BLOCK = (128, 2048)
VMEM_BYTES = 16 * 2**20
_ROW_MULTIPLE = 16  # of a bfloat16 tile
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Block(NamedTuple):
    """What a kernel sees of the logits: float32 `[rows, words]`, and a row's numbers as `[rows, 1]`."""

    logits: tuple[jax.Array, ...]
    numbers: Any
    column: jax.Array  # int32, of each word in the whole row
    inside: jax.Array  # false past the last word, where the logits are anything

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum over the words that there are."""
        return jnp.sum(jnp.where(self.inside, x, 0.0), axis=-1, keepdims=True)


def block_shape(rows: int, vocabulary: int, largest: tuple[int, int]) -> tuple[int, int]:
    """Rows and words of a block: even shares of the rows, and all where they are few."""
    blocks = -(-rows // largest[0])
    share = -(-rows // (blocks * _ROW_MULTIPLE)) * _ROW_MULTIPLE
    return rows if blocks == 1 else share, min(vocabulary, largest[1])


def _start(sums: tuple[Any, ...], values: tuple[float, ...]) -> None:
    """Give the sums of a row their first values at its first block of words."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for ref, value in zip(sums, values, strict=True):
            ref[...] = jnp.full(ref.shape, value, ref.dtype)


def _mass(block: Block, out: tuple[Any, ...]) -> None:
    """Keep maximum and sums relative to it; where a block raises the maximum, what was summed is scaled to it."""
    _start(out, (_LOWEST, 0.0, 0.0)[: len(out)])
    (z,) = block.logits
    max_ref, total_ref, *weighted_ref = out
    new = jnp.maximum(max_ref[...], jnp.max(jnp.where(block.inside, z, _LOWEST), axis=-1, keepdims=True))
    below = max_ref[...] - new
    scale, shifted = jnp.exp(below), z - new
    exp, total = jnp.exp(shifted), total_ref[...]
    max_ref[...] = new
    total_ref[...] = scale * total + block.sum(exp)
    for ref in weighted_ref:
        ref[...] = scale * (ref[...] + below * total) + block.sum(exp * shifted)


def _gaps(ask: Ask, block: Block, out: tuple[Any, ...]) -> None:
    _start(out, (0.0,) * len(out))
    logp, log_q = _log_probabilities(block, block.numbers)
    terms = gap_terms(logp, log_q, ask)
    for ref, term in zip(out, jax.tree.leaves(terms), strict=True):
        ref[...] += block.sum(term)


def _gradient(slope: Slope, block: Block, out: tuple[Any, ...]) -> None:
    *normals, line, place = block.numbers
    logp, *log_q = _log_probabilities(block, normals)
    d_z = gradient_terms(logp, log_q[0] if log_q else None, line, block.column == place)
    (ref,) = out
    ref[...] = (d_z * slope(block.logits[0])).astype(ref.dtype)


def _log_probabilities(block: Block, normals: Any) -> list[jax.Array]:
    return [(z - normal.max) - normal.log_total for z, normal in zip(block.logits, normals, strict=True)]


@dataclass(frozen=True)
class TPUSweeps:
    """The passes as kernels for TPUs; `interpret` runs them anywhere, slowly, for tests.

    `block` is the largest block of logits: rows, a multiple of 16, and words, a multiple of 128.
    """

    interpret: bool = False
    block: tuple[int, int] = BLOCK

    def refusal(self, vocabulary: int) -> str | None:
        """See `Sweeps.refusal`: they take all."""
        return None

    def mass(self, z_nV: jax.Array, *, weighted: bool) -> Mass:
        """See `Sweeps.mass`; one pass over the logits."""
        max_n, total_n, *rest = self._run(_mass, (z_nV,), (), sums=3 if weighted else 2)
        return Mass(max_n, total_n, rest[0] if weighted else None)

    def gaps(self, z_nV: jax.Array, y_nV: jax.Array, normal: Normal, other: Normal, *, ask: Ask) -> Gaps:
        """See `Sweeps.gaps`."""
        one = jnp.zeros((), jnp.float32)
        like = jax.eval_shape(lambda: gap_terms(one, one, ask))
        sums = self._run(_bound(_gaps, ask), (z_nV, y_nV), (normal, other), sums=len(jax.tree.leaves(like)))
        return jax.tree.unflatten(jax.tree.structure(like), sums)

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
        numbers = (line, place_n.astype(jnp.int32))
        if y_nV is None or other is None:
            return self._run(_bound(_gradient, slope), (z_nV,), (normal, *numbers), dtype=dtype)[0]
        return self._run(_bound(_gradient, slope), (z_nV, y_nV), (normal, other, *numbers), dtype=dtype)[0]

    def _run(
        self,
        body: Callable[[Block, tuple[Any, ...]], None],
        logits: tuple[jax.Array, ...],
        numbers: Any,
        *,
        sums: int = 0,
        dtype: jnp.dtype | None = None,
    ) -> list[jax.Array]:
        """Run a body on every block; it fills so many sums a row, or one `[n, V]` array of `dtype`."""
        (n, V), leaves = logits[0].shape, jax.tree.leaves(numbers)
        if n == 0:
            return [jnp.zeros((0,))] * sums if dtype is None else [jnp.zeros((0, V), dtype)]
        rows, words = block_shape(n, V, self.block)

        def kernel(*refs: Any) -> None:
            column = pl.program_id(1) * words + jax.lax.broadcasted_iota(jnp.int32, (rows, words), 1)
            values = [ref[...] for ref in refs[: len(logits) + len(leaves)]]
            row_numbers = jax.tree.unflatten(jax.tree.structure(numbers), values[len(logits) :])
            block = Block(tuple(values[: len(logits)]), row_numbers, column, column < V)
            body(block, refs[len(values) :])

        whole, narrow = pl.BlockSpec((rows, words), lambda i, j: (i, j)), pl.BlockSpec((rows, 1), lambda i, j: (i, 0))
        number = jax.ShapeDtypeStruct((n, 1), jnp.float32)
        out = pl.pallas_call(
            kernel,
            out_shape=[number] * sums if dtype is None else [jax.ShapeDtypeStruct((n, V), dtype)],
            grid=(pl.cdiv(n, rows), pl.cdiv(V, words)),
            in_specs=[whole] * len(logits) + [narrow] * len(leaves),
            out_specs=[narrow] * sums if dtype is None else [whole],
            input_output_aliases={0: 0} if dtype == jnp.float32 else {},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=self.interpret,
        )(*logits, *(x.reshape(n, 1) for x in leaves))
        return [x[:, 0] for x in out] if dtype is None else list(out)


def _bound(body: Callable[..., None], setting: Any) -> Callable[[Block, tuple[Any, ...]], None]:
    return lambda block, out: body(setting, block, out)


SWEEPS = TPUSweeps()
