"""The door to the vocabulary-wide token statistics: checks the arguments, picks the implementation."""

from __future__ import annotations

from typing import Literal

import jax

from ppojax.kernels import reference, tiled
from ppojax.lazy import Float, Int
from ppojax.types import TokenStats

Implementation = Literal["reference", "tiled"]


def token_stats(
    hidden_ND: Float[jax.Array, "N D"],
    head_VD: Float[jax.Array, "V D"],
    target_N: Int[jax.Array, " N"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> TokenStats:
    """Compute the log-probability of each target, and optionally the entropy, of the model's softmax.

        z = cap(hidden head^T) / temperature     logp_n = z[n, target_n] - lse(z[n])
        entropy_n = lse(z[n]) - sum_v softmax(z[n])_v z[n, v]                                  (nats)

    where cap(x) = softcap tanh(x / softcap) (Gemma 2, arXiv 2408.00118), or x where `softcap` is None: a model's logits
    are capped first, as in generation, and then sampled from at a temperature.

    `hidden_ND` and `head_VD` may be float32 or bfloat16; products are computed in float32 where the two differ. Logits
    accumulate in float32 and both statistics are float32. Differentiable in `hidden_ND` and `head_VD`, whose gradients
    come in their own dtypes; nothing is stop-gradiented. `temperature` and `softcap` are Python numbers. The default
    implementation, `tiled`, holds the logits of a few hundred rows at a time, or of all rows where they are few;
    `reference` holds them all, and is what the others are tested against.

    Raises ValueError when `temperature` or `softcap` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"token_stats: temperature is {temperature}, expected a number above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"token_stats: softcap is {softcap}, expected a number above 0, or None")
    run = {"reference": reference.token_stats, "tiled": tiled.token_stats}[implementation or "tiled"]
    return run(hidden_ND, head_VD, target_N, temperature=temperature, entropy=entropy, softcap=softcap)
