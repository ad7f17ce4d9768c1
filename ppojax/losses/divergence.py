"""Divergences between two policies at one token, from what each gives the token that was drawn."""

from __future__ import annotations

from ppojax.lazy import Float, jax, jnp

# exp of a difference of log-probabilities stays finite, and so does its square, in float32 (exp(20) is 5e8).
MAX_LOG_RATIO = 20.0
# Log-probabilities outside [-100, -2^-24] are 0 and 1 in float32; held inside, no logarithm below is infinite.
_LOG_ZERO = -100.0
_LOG_ONE = -(2.0**-24)


def log_ratio(logp: Float[jax.Array, "*dims"], logp_other: Float[jax.Array, "*dims"]) -> Float[jax.Array, "*dims"]:
    """Compute log(p / p_other), held within +-20; where the bound holds it, the gradient is 0."""
    return jnp.clip(logp - logp_other, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def log1mexp(x: Float[jax.Array, "*dims"]) -> Float[jax.Array, "*dims"]:
    """Compute log(1 - exp(x)) for x <= 0 without cancellation (Maechler 2012, "Accurately computing log(1-exp(-|a|))").

    x above -2^-24, where exp(x) rounds to 1 in float32, counts as -2^-24; so the result is never below -16.7.
    """
    x = jnp.minimum(x, _LOG_ONE)
    near = x > -0.6931472
    # Each branch gets a harmless argument where the other one is taken, so that neither gradient is NaN.
    close = jnp.log(-jnp.expm1(jnp.where(near, x, -0.5)))
    far = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, close, far)


def binary_tv(logp_from: Float[jax.Array, "*dims"], logp_to: Float[jax.Array, "*dims"]) -> Float[jax.Array, "*dims"]:
    """Compute TV = |mu(a) - pi(a)|, the total variation of {a, not a} (arXiv 2602.04879, eq. 13)."""
    return jnp.abs(jnp.exp(logp_from) - jnp.exp(logp_to))


def binary_kl(logp_from: Float[jax.Array, "*dims"], logp_to: Float[jax.Array, "*dims"]) -> Float[jax.Array, "*dims"]:
    """Compute KL = mu log(mu/pi) + (1-mu) log((1-mu)/(1-pi)), nats, over {a, not a} (arXiv 2602.04879, eq. 14).

    Finite for every input: a probability below e^-100, or nearer to 1 than 2^-24, counts as that.
    """
    logp_from = jnp.clip(logp_from, _LOG_ZERO, _LOG_ONE)
    logp_to = jnp.clip(logp_to, _LOG_ZERO, _LOG_ONE)
    chosen = jnp.exp(logp_from) * (logp_from - logp_to)
    others = -jnp.expm1(logp_from) * (log1mexp(logp_from) - log1mexp(logp_to))
    return jnp.maximum(chosen + others, 0.0)
