"""The KL divergence to the reference policy: estimated from the tokens that were drawn, or exact."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import Float, jax, jnp
from ppojax.losses.divergence import log_ratio
from ppojax.types import Experience, TokenStats

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
    estimator: Estimator | Literal["full"] = Field(
        default="k2",
        description="full: exact, over the whole vocabulary, at the cost of a second head product; of the drawn token: "
        "k2 and k3+ have the gradient of the KL; k3 is GRPO's, biased; k1 has none in expectation",
    )
    importance_cap: float | None = Field(
        default=5.0,
        gt=0,
        allow_inf_nan=True,
        description="the penalty is weighted by min(pi/mu, this), as the tokens were drawn from mu; "
        "null for no weight, as GRPO's code; full does not need it, only shares it",
    )

    @property
    def needs(self) -> frozenset[str]:
        """Which of the experience's optional arrays the penalty reads."""
        if self.coefficient == 0:
            return frozenset()
        return frozenset({"hidden_ref" if self.estimator == "full" else "logp_ref"})

    def __call__(self, stats: TokenStats, experience: Experience) -> Float[jax.Array, "B T"]:
        """Compute sg(min(pi/mu, cap)) KL(pi || ref), before the coefficient. The weight is stop-gradiented.

        The KL is `kl_estimate`, or with `full` the exact sum_v pi_v log(pi_v / ref_v) with its exact gradient, as
        `ppojax.kernels.token_stats` gives it.
        """
        kl_BT = self._kl(stats, experience)
        if self.importance_cap is None:
            return kl_BT
        ratio_BT = jnp.exp(log_ratio(stats.logp, experience.logp_behavior_BT))
        return jax.lax.stop_gradient(jnp.minimum(ratio_BT, self.importance_cap)) * kl_BT

    def _kl(self, stats: TokenStats, experience: Experience) -> Float[jax.Array, "B T"]:
        if self.estimator == "full":
            assert stats.kl_ref is not None, "the loss has an exact KL penalty, but kl_ref was not computed"
            return stats.kl_ref
        assert experience.logp_ref_BT is not None, "the loss has a KL penalty, but logp_ref was not scored"
        return kl_estimate(stats.logp, experience.logp_ref_BT, self.estimator)


class KLReward(Component):
    """Takes the KL to the reference policy off the reward of each action, before advantages are estimated."""

    needs: ClassVar[frozenset[str]] = frozenset({"logp_old", "logp_ref"})

    coefficient: float = Field(default=0.001, ge=0, description="weight of the KL, at the start where it is controlled")
    estimator: Estimator = Field(
        default="k1",
        description="estimate of the KL from the drawn token; only k1 has the right policy gradient",
    )
    target: float | None = Field(
        default=None, gt=0, description="KL of an episode, nats, that the coefficient is moved toward; null: it stays"
    )
    horizon: float = Field(default=10_000.0, gt=0, description="episodes over which a coefficient may multiply by e")

    def next(self, coefficient: float, kl: float, episodes: int) -> float:
        """Move the coefficient after a training step (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

        coefficient * (1 + error * episodes / horizon),  error = (kl / target - 1) held within +-0.2
        """
        if self.target is None:
            return coefficient
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return coefficient * (1.0 + error * episodes / self.horizon)
