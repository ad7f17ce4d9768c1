"""The passes as Triton kernels through jax-triton (the extra `triton`), cut as in `ppojax.kernels.pallas_gpu`.

For GPUs that Mosaic GPU does not serve, and to compare with. Where triton is installed, the tests interpret the kernels
and compile them for compute capability 9.0. Run and timed on no device yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ppojax.errors import ConfigError
from ppojax.kernels.sweeps import Ask, Gaps, Line, Mass, Normal, Slope

try:
    import jax_triton  # pyright: ignore[reportMissingImports]

    from ppojax.kernels import triton_kernels as kernels
except ImportError as error:
    raise ConfigError(f"token_stats: implementation='triton' needs the extra ppojax[triton] ({error})") from error

_WORDS = 4096  # of a piece: 32 registers in each of 128 threads, in one array of logits or in two


@dataclass(frozen=True)
class TritonSweeps:
    """The passes as Triton compiles them: for the GPU at hand, or for a `compute_capability` such as 90."""

    compute_capability: int | None = None

    def refusal(self, vocabulary: int) -> str | None:
        """See `Sweeps.refusal`: they take all."""
        return None

    def mass(self, z_nV: jax.Array, *, weighted: bool) -> Mass:
        """See `Sweeps.mass`."""
        sums_npk = self._sums(kernels.mass, z_nV, WEIGHTED=weighted)
        top_np, total_np, weighted_np, _ = jnp.unstack(sums_npk, axis=-1)
        max_n = jnp.max(top_np, axis=-1)
        below_np = top_np - max_n[:, None]
        scale_np = jnp.exp(below_np)
        total_n = jnp.sum(scale_np * total_np, axis=-1)
        return Mass(max_n, total_n, jnp.sum(scale_np * (weighted_np + below_np * total_np), -1) if weighted else None)

    def gaps(self, z_nV: jax.Array, y_nV: jax.Array, normal: Normal, other: Normal, *, ask: Ask) -> Gaps:
        """See `Sweeps.gaps`."""
        asked = {"KL": ask.kl, "REVERSE_KL": ask.reverse_kl, "TV": ask.tv}
        numbers_nk = _pack(normal, other, Line(None, None))
        sums_npk = self._sums(kernels.gaps, z_nV, y_nV, numbers_nk, NUMBERS=kernels.NUMBERS, **asked)
        sums = jnp.unstack(jnp.sum(sums_npk, axis=1), axis=-1)
        wanted = (ask.kl, ask.reverse_kl, ask.tv, ask.tv)
        return Gaps(*(x if want else None for x, want in zip(sums, wanted, strict=True)))

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
        y, q = (z_nV, Normal(None, None)) if y_nV is None or other is None else (y_nV, other)
        reference = q is other
        return self._run(
            kernels.gradient,
            jax.ShapeDtypeStruct(z_nV.shape, dtype),
            _words(z_nV, arrays=1 + reference),
            z_nV,
            y,
            _pack(normal, q, line),
            place_n,
            NUMBERS=kernels.NUMBERS,
            REFERENCE=reference,
            ENTROPY=line.entropy is not None,
            KL=reference and line.kl is not None,
            TV=reference and line.tv is not None,
            REVERSE_KL=reference and line.reverse_kl is not None,
            PER_TEMPERATURE=1.0 / slope.temperature,
            PER_CAP=0.0 if slope.softcap is None else slope.temperature / slope.softcap,
        )

    def _sums(self, kernel: Any, z_nV: jax.Array, *arrays: jax.Array, **constants: Any) -> jax.Array:
        words = _words(z_nV, arrays=2 if arrays else 1)
        out = jax.ShapeDtypeStruct((z_nV.shape[0], -(-z_nV.shape[1] // words), kernels.SUMS), jnp.float32)
        return self._run(kernel, out, words, z_nV, *arrays, SUMS=kernels.SUMS, **constants)

    def _run(
        self, kernel: Any, out: jax.ShapeDtypeStruct, words: int, z_nV: jax.Array, *arrays: jax.Array, **constants: Any
    ) -> jax.Array:
        rows, vocabulary = z_nV.shape
        pieces = -(-vocabulary // words)
        if rows == 0:  # CUDA has no empty grids
            return jnp.zeros(out.shape, out.dtype)
        return jax_triton.triton_call(
            z_nV,
            *arrays,
            kernel=kernel,
            out_shape=out,
            grid=(rows * pieces,),
            compute_capability=self.compute_capability,
            VOCABULARY=vocabulary,
            PIECES=pieces,
            WORDS=words,
            **constants,
        )


def _words(z_nV: jax.Array, arrays: int) -> int:
    """Words of a piece, a power of two."""
    return min(_WORDS // arrays, max(128, 1 << (z_nV.shape[1] - 1).bit_length()))


def _pack(normal: Normal, other: Normal, line: Line) -> jax.Array:
    """The numbers of each row, 0 where there is none."""
    numbers = (*normal, *other, *line)
    return jnp.stack([jnp.zeros_like(normal.max) if x is None else x for x in numbers], axis=-1)


SWEEPS = TritonSweeps()
