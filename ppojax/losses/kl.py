"""The KL divergence to the reference policy, estimated from the tokens that were drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import Float, jax, jnp
from ppojax.losses.divergence import log_ratio

Estimator = Literal["k1", "k2", "k3", "k3+"]


def kl_estimate(
    logp: Float[jax.Array, "*dims"], logp_ref: Float[jax.Array, "*dims"], estimator: Estimator
) -> Float[jax.Array, "*dims"]:
    """Estimate KL(pi || ref) at each token from one draw (Schulman 2020, "Approximating KL divergence").

        x = log(pi/ref), held within +-20
        k1 = x          k2 = x^2 / 2          k3 = exp(-x) - 1 + x          k3+ = k3 in value, k2 in gradient

    Differentiable in logp. As a loss on tokens drawn from pi, k2 (and k3+) has the gradient of the KL; k1's is zero in
    expectation, and k3's is that of the reverse KL. `logp_ref` is stop-gradiented.
    """
    x = log_ratio(logp, jax.lax.stop_gradient(logp_ref))
    if estimator == "k1":
        return x
    k2 = 0.5 * jnp.square(x)
    if estimator == "k2":
        return k2
    k3 = jnp.exp(-x) - 1.0 + x
    if estimator == "k3":
        return k3
    return jax.lax.stop_gradient(k3 - k2) + k2


class KLPenalty(Component):
    """A KL penalty to the frozen reference policy, added to a policy loss."""

    coefficient: float = Field(
        default=0.0, ge=0, description="weight of the penalty; 0 leaves out the reference policy"
    )
    estimator: Estimator = Field(
        default="k2",
        description="k2 and k3+ have the gradient of the KL; k3 is GRPO's, biased; k1 has none in expectation",
    )
    importance_cap: float | None = Field(
        default=5.0,
        gt=0,
        allow_inf_nan=True,
        description="the penalty is weighted by min(pi/mu, this), as the tokens were drawn from mu; "
        "null for no weight, as GRPO's code",
    )

    def __call__(
        self,
        logp_BT: Float[jax.Array, "B T"],
        logp_ref_BT: Float[jax.Array, "B T"],
        logp_behavior_BT: Float[jax.Array, "B T"],
    ) -> Float[jax.Array, "B T"]:
        """Compute sg(min(pi/mu, cap)) k(log pi - log ref), before the coefficient. The weight is stop-gradiented."""
        kl_BT = kl_estimate(logp_BT, logp_ref_BT, self.estimator)
        if self.importance_cap is None:
            return kl_BT
        weight_BT = jnp.minimum(jnp.exp(log_ratio(logp_BT, logp_behavior_BT)), self.importance_cap)
        return jax.lax.stop_gradient(weight_BT) * kl_BT
