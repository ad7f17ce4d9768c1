"""Divergences between two policies at one token, over a partition of the vocabulary: into the token that was drawn and
the rest, or also into the tokens that the first policy finds likeliest. A finer partition never shows a smaller one."""

from __future__ import annotations

from typing import NamedTuple

from ppojax.lazy import Bool, Float, jax, jnp

# exp of a difference of log-probabilities stays finite, and so does its square, in float32 (exp(20) is 5e8).
MAX_LOG_RATIO = 20.0
# Log-probabilities outside [-100, -2^-24] are 0 and 1 in float32; held inside, no logarithm below is infinite.
_LOG_ZERO = -100.0
_LOG_ONE = -(2.0**-24)


class Divergence(NamedTuple):
    """How far two policies are apart at each token."""

    tv: jax.Array  # total variation, 0 to 1
    kl: jax.Array  # KL(from || to), nats


def held(log_ratio: Float[jax.Array, "*dims"]) -> Float[jax.Array, "*dims"]:
    """Hold the logarithm of a ratio within +-20; where the bound holds it, the gradient is 0."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def log_ratio(logp: Float[jax.Array, "*dims"], logp_other: Float[jax.Array, "*dims"]) -> Float[jax.Array, "*dims"]:
    """Compute log(p / p_other), as `held`."""
    return held(logp - logp_other)


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


def binary(logp_from: Float[jax.Array, "*dims"], logp_to: Float[jax.Array, "*dims"]) -> Divergence:
    """Compute both over {a, not a}."""
    return Divergence(binary_tv(logp_from, logp_to), binary_kl(logp_from, logp_to))


def topk_divergence(
    top_from: Float[jax.Array, "*dims K"],
    top_to: Float[jax.Array, "*dims K"],
    drawn_from: Float[jax.Array, "*dims"],
    drawn_to: Float[jax.Array, "*dims"],
    listed: Bool[jax.Array, "*dims"],
) -> Divergence:
    """Compute TV and KL over TopK(mu) U {a} U {rest} from log-probabilities (arXiv 2602.04879, eq. 15 and 16).

        TV = 1/2 sum |mu_i - pi_i|              KL = sum mu_i log(mu_i / pi_i)

    The drawn token a is a member of its own unless it is `listed` among the K. Sums of probabilities are known to
    2^-24, so that a rest of less counts as that; all else is as in `binary_kl`. Not for gradients.
    """

    def members(top: jax.Array, drawn: jax.Array) -> jax.Array:
        own = jnp.where(listed, _LOG_ZERO, drawn)
        return jnp.clip(jnp.concatenate([top, own[..., None]], axis=-1), _LOG_ZERO, 0.0)

    mu, pi = members(top_from, drawn_from), members(top_to, drawn_to)
    gain = jnp.exp(mu) - jnp.exp(pi)
    # What the members lose the rest wins: its difference is theirs, without the cancellation of 1 - sum.
    tv = 0.5 * (jnp.sum(jnp.abs(gain), axis=-1) + jnp.abs(jnp.sum(gain, axis=-1)))
    rest_mu, rest_pi = (log1mexp(jax.nn.logsumexp(x, axis=-1)) for x in (mu, pi))
    kl = jnp.sum(jnp.exp(mu) * (mu - pi), axis=-1) + jnp.exp(rest_mu) * (rest_mu - rest_pi)
    return Divergence(jnp.minimum(tv, 1.0), jnp.maximum(kl, 0.0))
