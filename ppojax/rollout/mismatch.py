"""Gaps between sampler and trainer, put in on purpose, to study what they do to training.

A sampler of another compute type is `rollout.dtype`. Evaluation never has any of what is here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import jax, jnp

INT8_MAX = 127


class Mismatch(Component):
    """Gaps between sampler and trainer, put in on purpose; all are off by default, and then nothing is computed."""

    logit_noise: float = Field(
        default=0.0,
        ge=0,
        description="standard deviation of Gaussian noise on the sampler's logits, anew at each token; tokens are "
        "drawn from the noisy distribution, and their log-probabilities are recorded under it",
    )
    hidden_noise: float = Field(
        default=0.0,
        ge=0,
        description="standard deviation of Gaussian noise on the sampler's last hidden states, in units of their root "
        "mean square, anew at each token; what is recorded has it, so that the whole distribution is known",
    )
    cache: Literal["int8"] | None = Field(
        default=None,
        description="int8: keys and values are rounded to 8 bits, with a scale for each head and position, as they are "
        "written to the cache; they are kept in the usual type, so no memory is saved",
    )
    stale_steps: int = Field(
        default=0,
        ge=0,
        description="episodes are played with the weights of this many training steps ago, the oldest there are at "
        "first; costs a copy of the trained weights for each",
    )


def noisy(x_BV: jax.Array, key_B: jax.Array, position_B: jax.Array, deviation: float | jax.Array) -> jax.Array:
    """Add Gaussian noise of this standard deviation, a function of the episode's key and the position only."""

    def noise(key: jax.Array, position: jax.Array) -> jax.Array:
        # The draw itself takes the key of the position; this is another one.
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, position), 1), x_BV.shape[1:])

    return x_BV + deviation * jax.vmap(noise)(key_B, position_B)


def noisy_hidden(hidden_BD: jax.Array, key_B: jax.Array, position_B: jax.Array, share: float) -> jax.Array:
    """Add noise of `share` times each row's root mean square to hidden states; the result has their type."""
    x_BD = hidden_BD.astype("float32")
    rms_B1 = jnp.sqrt(jnp.mean(jnp.square(x_BD), axis=-1, keepdims=True))
    return (x_BD + rms_B1 * noisy(jnp.zeros_like(x_BD), key_B, position_B, share)).astype(hidden_BD.dtype)


def int8_rounded(x: jax.Array) -> jax.Array:
    """Round keys or values `[..., F]` to s q with q = round(x / s), |q| <= 127 and s = max_F |x| / 127.

    The error is s / 2 at most, 1/254 of the largest of the F numbers (symmetric, as in arXiv 2211.10438). The result
    has the type of `x`.
    """
    x32 = x.astype("float32")
    scale = jnp.max(jnp.abs(x32), axis=-1, keepdims=True) / INT8_MAX
    return (jnp.round(x32 / jnp.where(scale > 0, scale, 1.0)) * scale).astype(x.dtype)
