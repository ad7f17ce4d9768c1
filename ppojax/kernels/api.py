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
    implementation: Implementation | None = None,
) -> TokenStats:
    """Compute the log-probability of each target, and optionally the entropy, of softmax(hidden head^T / temperature).

        z = hidden head^T / temperature          logp_n = z[n, target_n] - lse(z[n])
        entropy_n = lse(z[n]) - sum_v softmax(z[n])_v z[n, v]                                  (nats)

    `hidden_ND` and `head_VD` may be float32 or bfloat16; products are computed in float32 where the two differ. Logits
    accumulate in float32 and both statistics are float32. Differentiable in `hidden_ND` and `head_VD`, whose gradients
    come in their own dtypes; nothing is stop-gradiented. `temperature` is a Python number. The default implementation,
    `tiled`, holds the logits of a few hundred rows at a time, or of all rows where they are few; `reference` holds them
    all, and is what the others are tested against.

    Raises ValueError when `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"token_stats: temperature is {temperature}, expected a number above 0")
    run = {"reference": reference.token_stats, "tiled": tiled.token_stats}[implementation or "tiled"]
    return run(hidden_ND, head_VD, target_N, temperature=temperature, entropy=entropy)
