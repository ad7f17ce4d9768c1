"""Generalised advantage estimation over rows whose tokens are not all the policy's."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field

from ppojax.advantages.chain import Chains, CutRule, behind, beside, over_rows, power
from ppojax.advantages.ensemble import EnsembleMask
from ppojax.advantages.whiten import whiten
from ppojax.component import Component
from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.types import Advantage, Ending, Experience


class GAE(Component):
    """Generalised advantage estimation with separate lambdas for the policy and for the critics' targets."""

    needs_values: ClassVar[bool] = True

    type: Literal["gae"] = "gae"
    gamma: float = Field(default=1.0, ge=0, le=1, description="discount per step")
    lambda_policy: float = Field(
        default=0.95, ge=0, le=1, description="lambda of the advantage, where length_alpha is null"
    )
    length_alpha: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=True,
        description="in place of lambda_policy, 1 - 1/(length_alpha L) and at least 0, with L the actions of the "
        "episode (of the row, with cut_rule scale and broadcast): VAPO 0.05, BPCO 0.4, SAO and CompactionRL 1.5",
    )
    lambda_value: float = Field(
        default=1.0, ge=0, le=1, description="lambda of the critics' targets; 1: Monte-Carlo returns"
    )
    mask_rule: Literal["skip", "zero", "dense"] = Field(
        default="skip",
        description="tokens that the policy did not choose: skip: no step in time; zero: a step with value 0; "
        "dense: a step with the critic's value",
    )
    truncation: Literal["bootstrap", "zero", "mask_out"] = Field(
        default="bootstrap",
        description="a row that hit a limit: bootstrap: goes on with the value of its last state; zero: ends there; "
        "mask_out: gives no advantage, and the critic's own value as its target, in all rows of the episode",
    )
    cut_rule: CutRule = Field(
        default="chain",
        description="an episode of several rows: chain: goes on with the next row's first action as if it had not been "
        "cut; scale: a row ends with the reward of the later ones, its advantages shrink by "
        "(gamma lambda_policy)^(their actions); broadcast: a row ends so that it has the whole episode's reward",
    )
    whiten: Literal["off", "batch"] = Field(default="off", description="batch: advantages to mean 0 and deviation 1")
    whiten_floor: float = Field(
        default=0.1,
        gt=0,
        description="smallest deviation to divide by, so that equal rewards do not blow up value noise",
    )

    ensemble: EnsembleMask = Field(
        default=EnsembleMask(), description="what the disagreement of several critics decides (AsyPPO)"
    )

    @property
    def bootstraps(self) -> bool:
        """Whether a truncated episode goes on with a value."""
        return self.truncation == "bootstrap"

    def __call__(self, experience: Experience) -> Advantage:
        """Estimate advantages and the critics' targets from right to left (arXiv 1506.02438, eq. 16).

            delta_t = r_t + gamma V_{t+1} - V_t          trace_t = delta_t + gamma lambda trace_{t+1}
            advantage_t = trace_t(lambda_policy, mean over critics)      return_t = V_t + trace_t(lambda_value)

        t + 1 is the next position that counts under `mask_rule`; under `skip` value and trace pass over the others
        unchanged. After the last token comes V = 0 when the row terminated, `value_MBT[:, :, length]` when it was cut
        and no row of the batch goes on, and what `truncation` says when it was truncated. Each critic's target is made
        of its own values, before whitening; `ensemble` sets advantages to 0 after it. Both results are 0 off action,
        and stop-gradiented.

        Where another row goes on, what comes after the last token is X, of which (gamma lambda)^(steps after t) X
        arrives in trace_t:

            chain       X = gamma (V_first + lambda trace_first) of the next row: delta and trace of the uncut episode
            scale       X = rewards of all later rows + gamma V behind the last one, where that goes on
                        advantage_t = (gamma lambda_policy)^(actions of later rows) trace_t       (arXiv 2607.05378)
            broadcast   X = as scale, + rewards of all earlier rows, also behind the episode's last row

        `first` is a row's first action: under every `mask_rule` the tokens before it, which tell again what happened
        before, are no steps in time. A row without an action passes on what follows it.

        With rewards only at the end of the episode, X of `scale` is the final reward that all segments share in the
        paper. It leaves rewards inside a segment where they are, and counts each once; so with gamma = lambda = 1
        `scale` is `chain`. Its critic target is not scaled: V + c trace = (1 - c) V + c (V + trace) would hold the
        critic to what it says already. In `broadcast` too, rewards stay where they are; X makes them add up to the
        episode's return in each row. Neither discounts over other rows what it takes from them.
        """
        experience = jax.lax.stop_gradient(experience)
        value_MBT = experience.value_MBT
        assert value_MBT is not None, "GAE needs the critics' values, which were not scored"
        action_BT = experience.action_BT
        position_T = jnp.arange(action_BT.shape[1], dtype=jnp.int32)
        inside_BT = position_T[None, :] < experience.length_B[:, None]
        step_BT = action_BT if self.mask_rule == "skip" else inside_BT
        known_BT = inside_BT if self.mask_rule == "dense" else action_BT
        value_MBT = jnp.where(known_BT[None], value_MBT, 0.0)
        chains = Chains.of(experience)
        end_MB = self._value_after(experience, chains)

        lambda_ = self._lambda_policy(action_BT, chains)
        trace = partial(self._trace, experience, chains, step_BT)
        mean = partial(jnp.mean, axis=0, keepdims=True)
        advantage_BT = trace(mean(value_MBT), mean(end_MB), lambda_)[0]
        return_MBT = value_MBT + trace(value_MBT, end_MB, self.lambda_value)
        if self.cut_rule == "scale":
            later_B = over_rows(chains.later_BB, jnp.sum(action_BT, axis=1, dtype=jnp.float32))
            advantage_BT *= power(self.gamma * lambda_, later_B)[:, None]
        counted_BT = action_BT
        if self.truncation == "mask_out":
            counted_BT = action_BT & ~_truncated(experience, chains)[:, None]
            return_MBT = jnp.where(counted_BT[None], return_MBT, value_MBT)
        if self.whiten == "batch":
            advantage_BT = whiten(advantage_BT, counted_BT, self.whiten_floor)
        masks = self.ensemble(value_MBT, action_BT)
        if masks.agreed_BT is not None:
            counted_BT &= ~masks.agreed_BT
        advantage_BT = jnp.where(counted_BT, advantage_BT, 0.0)
        return Advantage(advantage_BT, jnp.where(action_BT[None], return_MBT, 0.0), masks.explored_BT)

    def _lambda_policy(self, action_BT: Bool[jax.Array, "B T"], chains: Chains) -> float | Float[jax.Array, " B"]:
        """The policy's lambda, with `length_alpha` one for each row (VAPO, arXiv 2504.05118).

            lambda = max(0, 1 - 1/(length_alpha L)),      L = the actions that the trace runs over

        So the reward at the end weighs exp(-1/length_alpha) in the advantage of the first of many actions, however many
        they are. L is of all rows of the episode with cut_rule=chain; with scale (as in arXiv 2607.05378) and broadcast
        it is of the row.
        """
        if self.length_alpha is None:
            return self.lambda_policy
        count_B = jnp.sum(action_BT, axis=1, dtype=jnp.float32)
        if self.cut_rule == "chain":
            count_B = count_B + over_rows(chains.later_BB | chains.later_BB.T, count_B)
        return jnp.maximum(1.0 - 1.0 / (self.length_alpha * jnp.maximum(count_B, 1.0)), 0.0)

    def _value_after(self, experience: Experience, chains: Chains) -> Float[jax.Array, "M B"]:
        assert experience.value_MBT is not None
        index_MB1 = jnp.broadcast_to(experience.length_B[None, :, None], (*experience.value_MBT.shape[:2], 1))
        # Out of range is NaN (mode=fill): a row without room for this value must not pass unseen.
        last_MB = jnp.take_along_axis(experience.value_MBT, index_MB1, axis=2, mode="fill")[:, :, 0]
        goes_on_B = (experience.ending_B == Ending.CUT) & ~chains.linked_B
        if self.truncation == "bootstrap":
            goes_on_B |= experience.ending_B == Ending.TRUNCATED
        return jnp.where(goes_on_B[None], last_MB, 0.0)

    def _trace(
        self,
        experience: Experience,
        chains: Chains,
        step_BT: Bool[jax.Array, "B T"],
        value_MBT: Float[jax.Array, "M B T"],
        end_MB: Float[jax.Array, "M B"],
        lambda_: float | Float[jax.Array, " B"],
    ) -> Float[jax.Array, "M B T"]:
        gamma = self.gamma
        trace_MBT = _traces(value_MBT, experience.reward_BT, step_BT, end_MB, gamma, lambda_)
        x_MB = behind(self.cut_rule, experience, chains, step_BT, value_MBT, trace_MBT, end_MB, gamma, lambda_)
        count_BT = step_BT.astype(jnp.int32)
        later_BT = jax.lax.cumsum(count_BT, axis=1, reverse=True) - count_BT
        return trace_MBT + power(gamma * beside(lambda_, 1), later_BT)[None] * x_MB[:, :, None]


def _truncated(e: Experience, chains: Chains) -> Bool[jax.Array, " B"]:
    """Whether a row or a later one of its episode hit a limit."""
    truncated_B = e.ending_B == Ending.TRUNCATED
    return truncated_B | (chains.later_BB & truncated_B[None, :]).any(axis=1)


def _traces(
    value_MBT: Float[jax.Array, "M B T"],
    reward_BT: Float[jax.Array, "B T"],
    step_BT: Bool[jax.Array, "B T"],
    next_value_MB: Float[jax.Array, "M B"],
    gamma: float,
    lambda_: float | Float[jax.Array, " B"],
) -> Float[jax.Array, "M B T"]:
    decay = gamma * beside(lambda_, 0)

    def body(carry, inputs):
        next_value_MB, trace_MB = carry
        value_MB, reward_B, step_B = inputs
        delta_MB = reward_B[None] + gamma * next_value_MB - value_MB
        stepped = (value_MB, delta_MB + decay * trace_MB)
        carry = jax.tree.map(lambda new, old: jnp.where(step_B[None], new, old), stepped, carry)
        return carry, carry[1]

    inputs = (jnp.moveaxis(value_MBT, 2, 0), reward_BT.T, step_BT.T)
    _, trace_TMB = jax.lax.scan(body, (next_value_MB, jnp.zeros_like(next_value_MB)), inputs, reverse=True)
    return jnp.moveaxis(trace_TMB, 0, 2)
