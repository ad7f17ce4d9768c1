"""Policy gradient inside a divergence trust region."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field

from ppojax.actions import at_actions, to_tokens
from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.losses.anchored import AnchoredLoss
from ppojax.losses.divergence import Divergence, binary, topk_divergence
from ppojax.losses.weighted import WeightedLoss, region_metrics
from ppojax.masking import masked_max, masked_mean
from ppojax.types import Batch, LossOut, Metrics, Records, TokenStats

_DEFAULT_DELTA = {"tv": 0.2, "kl": 0.05}
Support = Literal["binary", "topk", "full"]
# Sums of float32 probabilities, and logits computed twice in another order, differ by some 1e-6 (of a KL over 1, too).
_ORDER_SLACK = 1e-5


class DPPO(AnchoredLoss, WeightedLoss):
    """Divergence PPO: importance-weighted policy gradient without the tokens that would leave the trust region."""

    type: Literal["dppo"] = "dppo"
    divergence: Literal["tv", "kl"] = Field(
        default="tv", description="total variation, or KL from the anchor to the policy"
    )
    support: Support = Field(
        default="binary",
        description="binary: the drawn token against all others; topk: also the likeliest tokens, each for itself; "
        "full: every token of the vocabulary; the last two need what the sampler then keeps of each action",
    )
    top_k: int = Field(default=20, ge=1, description="likeliest tokens that the sampler keeps for support=topk")
    compare_supports: bool = Field(
        default=False,
        description="measure all three supports, whichever decides, and check on each token that a finer one is larger",
    )
    anchor: Literal["behavior", "old"] = Field(
        default="behavior",
        description="policy the divergence is measured from; old is known to collapse, for comparison only",
    )
    delta_low: float | None = Field(
        default=None,
        gt=0,
        description="largest divergence for A < 0; null: 0.2 for tv, 0.05 for kl; 1 or more turns tv off",
    )
    delta_high: float | None = Field(default=None, gt=0, description="the same for A > 0")
    cap: float = Field(
        default=5.0,
        gt=0,
        allow_inf_nan=True,
        description="largest importance weight pi/mu; inf allowed; 3 is known to collapse",
    )

    @property
    def off_policy(self) -> bool:
        """Always: the weight is the ratio to the sampler, whatever the anchor."""
        return True

    @property
    def records(self) -> Records:
        """What the sampler must keep of its distribution for the loss."""
        topk, full = (self.compare_supports or self.support == support for support in ("topk", "full"))
        return Records(self.top_k if topk else 0, hidden=full)

    def __call__(self, stats: TokenStats, batch: Batch) -> LossOut:
        """Compute the loss of DPPO (arXiv 2602.04879, eq. 12) over the action tokens of a batch.

            loss_t = -A_t sg(min(rho_t, cap)) M_t log pi(y_t),          rho = pi/mu
            M_t = 0 where A_t > 0 and r_t > 1 and D_t > delta_high, or A_t < 0 and r_t < 1 and D_t > delta_low; else 1
            D_t = D(anchor(.|s_t) || pi(.|s_t)),                        r = pi/anchor

        With anchor = behavior, r = rho. The weight, the mask and A are stop-gradiented. log rho is held within +-20.
        D is taken over `support`: {a, not a} (eq. 13, 14), TopK(mu) U {a} U {rest} (eq. 15, 16) or the vocabulary.
        `actor/pg_loss` reports the value above. Shares of masked tokens leave out tokens of zero advantage.
        `trust_region/order_violation_frac` is of tokens where a coarser support shows more than a finer one.
        """
        logp_BT, anchor_BT = jax.lax.stop_gradient(stats.logp), self.logp_anchor(batch)
        found = self._divergences(stats, batch, anchor_BT)
        used = found[self.support]
        measured_BT = used.tv if self.divergence == "tv" else used.kl
        outside_BT = self._outside(measured_BT, logp_BT - anchor_BT, batch.advantage_BT)
        weight_BT = jnp.where(outside_BT, 0.0, self.importance(stats, batch))
        metrics = region_metrics(outside_BT, stats, batch, anchor_BT, used)
        return self.weigh(weight_BT, stats, batch, metrics | _order_metrics(list(found.values()), batch))

    def _divergences(
        self, stats: TokenStats, batch: Batch, anchor_BT: Float[jax.Array, "B T"]
    ) -> dict[Support, Divergence]:
        """Measure the trust region with each support that there are numbers for, from the coarsest to the finest."""
        stats = jax.lax.stop_gradient(stats)
        found: dict[Support, Divergence] = {"binary": binary(anchor_BT, stats.logp)}
        records = self.records
        if records.top_k:
            found["topk"] = _topk(stats, batch)
        if records.hidden:
            assert stats.tv is not None and stats.reverse_kl is not None, "support=full, but no TV and KL were computed"
            found["full"] = Divergence(stats.tv, stats.reverse_kl)
        return found

    def _outside(
        self,
        divergence_BT: Float[jax.Array, "B T"],
        log_ratio_BT: Float[jax.Array, "B T"],
        advantage_BT: Float[jax.Array, "B T"],
    ) -> Bool[jax.Array, "B T"]:
        default = _DEFAULT_DELTA[self.divergence]
        high = default if self.delta_high is None else self.delta_high
        low = default if self.delta_low is None else self.delta_low
        rises_BT = (advantage_BT > 0) & (log_ratio_BT > 0) & (divergence_BT > high)
        falls_BT = (advantage_BT < 0) & (log_ratio_BT < 0) & (divergence_BT > low)
        return rises_BT | falls_BT


def _topk(stats: TokenStats, batch: Batch) -> Divergence:
    """The divergence from the sampler over its likeliest tokens, the drawn one and the rest."""
    e = batch.experience
    index_BA, recorded = e.action_index_BA, e.recorded
    assert stats.topk_logp is not None, "support=topk, but no top-K log-probabilities were computed"
    drawn_BA1 = at_actions(e.token_BT, index_BA)[:, :, None]
    over_BA = topk_divergence(
        recorded.top_logp,
        stats.topk_logp,
        at_actions(e.logp_behavior_BT, index_BA),
        at_actions(stats.logp, index_BA),
        jnp.any(recorded.top_id == drawn_BA1, axis=-1),
    )
    return Divergence(*(to_tokens(x_BA, index_BA, e.token_BT.shape[1]) for x_BA in over_BA))


def _order_metrics(found: list[Divergence], batch: Batch) -> Metrics:
    """Check on each token that no divergence shrinks from one support to the next finer one."""
    if len(found) == 1:
        return {}
    action_BT = batch.experience.action_BT
    excess_BT, broken_BT = jnp.zeros_like(found[0].tv), jnp.zeros_like(action_BT)
    for coarse, fine in pairwise(found):
        for less, more in zip(coarse, fine, strict=True):
            excess_BT = jnp.maximum(excess_BT, less - more)
            broken_BT |= less - more > _ORDER_SLACK * (1.0 + less)
    return {
        "trust_region/order_violation_frac": masked_mean(broken_BT.astype(jnp.float32), action_BT),
        "trust_region/order_excess_max": masked_max(excess_BT, action_BT),
    }
