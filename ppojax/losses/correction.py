"""Corrections for a sampler that is not quite the policy at the start of the update."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ppojax.component import Component
from ppojax.lazy import Float, jax, jnp
from ppojax.losses.divergence import held, log_ratio
from ppojax.losses.sequence import over_row
from ppojax.masking import masked_mean
from ppojax.types import Experience, Metrics


class Correction(Component):
    """An importance weight on a loss whose ratio is taken to the policy at the start of the update."""

    method: Literal["none", "truncate", "mask"] = Field(
        default="none",
        description="truncate: the weight pi_old/mu, held in [low, high] (TIS; with high=inf decoupled PPO); mask: the "
        "weight, and 0 outside of [low, high] (MIS; IcePop with low=0.5, high=5); none: 1",
    )
    level: Literal["token", "sequence", "geometric"] = Field(
        default="token",
        description="what the weight is of: each token; the whole row, a product; its geometric mean over tokens",
    )
    weight: Literal["level", "token", "one"] = Field(
        default="level",
        description="method=mask, what is not masked weighs: level: the ratio that is bounded; token: each token's own "
        "pi_old/mu; one: 1, a rejection alone",
    )
    low: float = Field(default=0.0, ge=0, description="lower end of what counts")
    high: float = Field(default=2.0, gt=0, allow_inf_nan=True, description="upper end of what counts; inf for none")

    @model_validator(mode="after")
    def _in_order(self) -> Correction:
        if not self.low < self.high:
            raise ValueError(f"correction: low ({self.low}) must be under high ({self.high})")
        if self.weight != "level" and self.method != "mask":
            raise ValueError(f"correction: weight={self.weight} is for method=mask; set weight=level")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Which of the experience's optional arrays the weight reads."""
        return frozenset() if self.method == "none" else frozenset({"logp_old"})

    def __call__(self, experience: Experience) -> tuple[Float[jax.Array, "B T"], Metrics]:
        """Compute the weight of each token, stop-gradiented, and how it is spread.

            token      w_t = pi_old(y_t)/mu(y_t)     sequence   w = prod_t w_t      geometric  w = (prod_t w_t)^(1/n)
            truncate   min(max(w, low), high)        mask       w where low <= w <= high, else 0

        With mask, `weight` may put the token's own w, or 1, in the place of a row's w that is not masked.
        TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; IcePop: arXiv
        2510.18855; decoupled PPO: arXiv 2110.00641, as in AReaL, arXiv 2505.24298. Logarithms are held within +-20.
        """
        if self.method == "none":
            return jnp.ones_like(experience.logp_behavior_BT), {}
        assert experience.logp_old_BT is not None, "the correction needs logp_old, which was not scored"
        action_BT = experience.action_BT
        log_BT = token_BT = log_ratio(experience.logp_old_BT, experience.logp_behavior_BT)
        if self.level != "token":
            log_BT = over_row(log_BT, action_BT, mean=self.level == "geometric")
        ratio_BT = jnp.exp(held(log_BT))
        outside_BT = (ratio_BT < self.low) | (ratio_BT > self.high)
        if self.method == "truncate":
            used_BT = jnp.clip(ratio_BT, self.low, self.high)
        else:
            kept_BT = {"level": ratio_BT, "token": jnp.exp(token_BT), "one": jnp.ones_like(ratio_BT)}[self.weight]
            used_BT = jnp.where(outside_BT, 0.0, kept_BT)
        metrics: Metrics = {
            "correction/weight_mean": masked_mean(used_BT, action_BT),
            "correction/outside_frac": masked_mean(outside_BT.astype(jnp.float32), action_BT),
        }
        return jax.lax.stop_gradient(used_BT), metrics
