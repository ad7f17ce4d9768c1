"""The door to the vocabulary-wide token statistics: checks the arguments, picks the implementation.

`tiled`, the default, holds the logits of a few hundred rows at a time, or of all rows where they are few;
`pallas_gpu`, `pallas_tpu` and `triton` do the same with their own passes over each tile; `reference` holds all logits,
and is what the others are tested against. On a mesh of several devices the vocabulary is split over its `tensor` axis
and the rows over the others; `reference` does not do that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ppojax.kernels import reference as whole
from ppojax.kernels import sharded, tiled
from ppojax.kernels.dispatch import Implementation, choose, platform_of
from ppojax.kernels.sweeps import Ask
from ppojax.types import TokenStats


def token_stats(
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    target_N: jax.Array,
    *,
    reference: tuple[jax.Array, jax.Array] | None = None,
    topk_id_NK: jax.Array | None = None,
    entropy: bool = False,
    kl: bool = False,
    reverse_kl: bool = False,
    tv: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    implementation: Implementation | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> TokenStats:
    """Compute statistics of the model's softmax p, over the whole vocabulary, without holding [N, V].

        z = cap(hidden head^T) / temperature         logp_n = log p[n, target_n] = z[n, target_n] - lse(z[n])
        entropy = -sum_v p_v log p_v                 topk_logp_k = log p[n, id_k]               (nats)
        kl = KL(p || q) = sum_v p_v log(p_v / q_v)   reverse_kl = KL(q || p)
        tv = 1/2 sum_v |p_v - q_v|

    where cap(x) = softcap tanh(x / softcap) (Gemma 2, arXiv 2408.00118), or x where `softcap` is None: a model's logits
    are capped first, as in generation, and then sampled from at a temperature. q is the softmax of `reference`: the
    hidden states and the head of the policy that sampled, or of a frozen one, of any width, at the same temperature and
    cap. Only what is asked for is computed; `topk_logp` comes with `topk_id_NK`, where -1 names no token.

    Types: `hidden_ND` and `head_VD` may be float32 or bfloat16; products are computed in float32 where the two differ.
    Logits accumulate in float32 and every statistic is float32. Differentiable in `hidden_ND` and `head_VD`, whose
    gradients come in their own dtypes, by one backward sweep for all statistics; the reference is a constant. At
    p_v = q_v, where |p - q| has no slope, it counts as 0.

    Raises ValueError for a `temperature` or `softcap` that is not positive, shapes that disagree, a divergence that has
    no reference, a mesh that does not divide the vocabulary, a target or id outside the vocabulary, and an
    implementation that does not run here. One that runs here but cannot take such a vocabulary gives way to `tiled`,
    with one warning. Inside `jit`, where ids have no values yet, a target outside has logp = -lse (in `reference`:
    anything).
    """
    _check(hidden_ND, head_VD, target_N, reference, topk_id_NK, temperature, softcap)
    ask = Ask(entropy, kl, reverse_kl, tv)
    if ask.reference and reference is None:
        raise ValueError("token_stats: kl, reverse_kl and tv compare with a reference: give reference=(hidden, head)")
    reference = reference if ask.reference else None
    if implementation == "reference":
        settings = {"temperature": temperature, "softcap": softcap} | ask._asdict()
        return whole.token_stats(hidden_ND, head_VD, target_N, reference, topk_id_NK, **settings)
    inputs = tiled.Inputs(hidden_ND, head_VD, target_N, *(reference or (None, None)), topk_id_NK)
    parts = 1 if mesh is None else mesh.shape[sharded.VOCABULARY]
    if head_VD.shape[0] % parts:
        raise ValueError(f"token_stats: mesh.{sharded.VOCABULARY} = {parts} does not divide V = {head_VD.shape[0]}")
    sweeps = choose(implementation, platform_of(mesh), head_VD.shape[0] // parts)
    if mesh is None or mesh.size == 1:
        return tiled.token_stats(inputs, temperature=temperature, softcap=softcap, ask=ask, sweeps=sweeps)
    return sharded.token_stats(inputs, temperature=temperature, softcap=softcap, ask=ask, mesh=mesh, sweeps=sweeps)


def _check(
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    target_N: jax.Array,
    reference: tuple[jax.Array, jax.Array] | None,
    topk_id_NK: jax.Array | None,
    temperature: float,
    softcap: float | None,
) -> None:
    if not temperature > 0:
        raise ValueError(f"token_stats: temperature is {temperature}, expected a number above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"token_stats: softcap is {softcap}, expected a number above 0, or None")
    matrices = (hidden_ND, head_VD, *(reference or ()))
    if any(x.ndim != 2 for x in matrices) or not jnp.issubdtype(target_N.dtype, jnp.integer):
        raise ValueError(
            f"token_stats: hidden states and heads have shapes {[x.shape for x in matrices]}, the target is "
            f"{target_N.dtype}: expected matrices, and whole numbers"
        )
    (N, D), V = hidden_ND.shape, head_VD.shape[0]
    if head_VD.shape[1] != D or target_N.shape != (N,):
        raise ValueError(
            f"token_stats: hidden {hidden_ND.shape}, head {head_VD.shape} and target {target_N.shape} disagree: "
            f"expected [N, D], [V, D] and [N]"
        )
    if reference is not None:
        hidden, head = reference
        if hidden.shape[0] != N or head.shape[0] != V or hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"token_stats: reference {hidden.shape}, {head.shape} does not fit N = {N}, V = {V}: expected [N, R] "
                f"and [V, R]"
            )
    if topk_id_NK is not None and (topk_id_NK.ndim != 2 or topk_id_NK.shape[0] != N):
        raise ValueError(f"token_stats: topk_id {topk_id_NK.shape} does not fit N = {N}: expected [N, K]")
    _check_ids("target", target_N, 0, V)
    if topk_id_NK is not None:
        _check_ids("topk_id", topk_id_NK, -1, V)


def _check_ids(name: str, ids: jax.Array, least: int, vocabulary: int) -> None:
    """Look at ids that have values; on many hosts nobody has them all."""
    if isinstance(ids, Tracer) or not ids.size or (isinstance(ids, jax.Array) and not ids.is_fully_addressable):
        return
    id_N = np.asarray(ids)
    lowest, highest = id_N.min(), id_N.max()
    if lowest < least or highest >= vocabulary:
        wrong = lowest if lowest < least else highest
        raise ValueError(f"token_stats: {name} has {wrong}, expected ids from {least} to {vocabulary - 1}")
