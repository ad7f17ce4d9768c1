"""Generalised advantage estimation over rows whose tokens are not all the policy's."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.masking import masked_mean
from ppojax.types import Advantage, Ending, Experience


class GAE(Component):
    """Generalised advantage estimation with separate lambdas for the policy and for the critics' targets."""

    needs_values: ClassVar[bool] = True

    type: Literal["gae"] = "gae"
    gamma: float = Field(default=1.0, ge=0, le=1, description="discount per step")
    lambda_policy: float = Field(default=0.95, ge=0, le=1, description="lambda of the advantage")
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
        "mask_out: gives no advantage, and the critic's own value as its target",
    )
    whiten: Literal["off", "batch"] = Field(default="off", description="batch: advantages to mean 0 and deviation 1")
    whiten_floor: float = Field(
        default=0.1,
        gt=0,
        description="smallest deviation to divide by, so that equal rewards do not blow up value noise",
    )

    def __call__(self, experience: Experience) -> Advantage:
        """Estimate advantages and the critics' targets from right to left (arXiv 1506.02438, eq. 16).

            delta_t = r_t + gamma V_{t+1} - V_t          trace_t = delta_t + gamma lambda trace_{t+1}
            advantage_t = trace_t(lambda_policy, mean over critics)      return_t = V_t + trace_t(lambda_value)

        t + 1 is the next position that counts under `mask_rule`; under `skip` value and trace pass over the others
        unchanged. After the last token comes V = 0 when the row terminated, `value_MBT[:, :, length]` when it was cut,
        and what `truncation` says when it was truncated. Each critic's target is made of its own values, before
        whitening. Both results are 0 off action, and stop-gradiented.
        """
        value_MBT = experience.value_MBT
        assert value_MBT is not None, "GAE needs the critics' values, which were not scored"
        action_BT = experience.action_BT
        position_T = jnp.arange(action_BT.shape[1], dtype=jnp.int32)
        inside_BT = position_T[None, :] < experience.length_B[:, None]
        step_BT = action_BT if self.mask_rule == "skip" else inside_BT
        known_BT = inside_BT if self.mask_rule == "dense" else action_BT
        value_MBT = jnp.where(known_BT[None], value_MBT, 0.0)
        next_value_MB = self._value_after(experience)

        advantage_MBT = _traces(
            jnp.mean(value_MBT, axis=0, keepdims=True),
            experience.reward_BT,
            step_BT,
            jnp.mean(next_value_MB, axis=0, keepdims=True),
            self.gamma,
            self.lambda_policy,
        )
        return_MBT = value_MBT + _traces(
            value_MBT, experience.reward_BT, step_BT, next_value_MB, self.gamma, self.lambda_value
        )
        advantage_BT = advantage_MBT[0]
        counted_BT = action_BT
        if self.truncation == "mask_out":
            truncated_B = experience.ending_B == Ending.TRUNCATED
            counted_BT = action_BT & ~truncated_B[:, None]
            return_MBT = jnp.where(counted_BT[None], return_MBT, value_MBT)
        if self.whiten == "batch":
            advantage_BT = self._whiten(advantage_BT, counted_BT)
        return Advantage(
            jax.lax.stop_gradient(jnp.where(counted_BT, advantage_BT, 0.0)),
            jax.lax.stop_gradient(jnp.where(action_BT[None], return_MBT, 0.0)),
        )

    def _value_after(self, experience: Experience) -> Float[jax.Array, "M B"]:
        assert experience.value_MBT is not None
        index_MB1 = jnp.broadcast_to(experience.length_B[None, :, None], (*experience.value_MBT.shape[:2], 1))
        # Out of range is NaN (mode=fill): a row without room for this value must not pass unseen.
        last_MB = jnp.take_along_axis(experience.value_MBT, index_MB1, axis=2, mode="fill")[:, :, 0]
        goes_on_B = experience.ending_B == Ending.CUT
        if self.truncation == "bootstrap":
            goes_on_B |= experience.ending_B == Ending.TRUNCATED
        return jnp.where(goes_on_B[None], last_MB, 0.0)

    def _whiten(
        self, advantage_BT: Float[jax.Array, "B T"], mask_BT: Bool[jax.Array, "B T"]
    ) -> Float[jax.Array, "B T"]:
        total = masked_mean(advantage_BT, mask_BT)
        centered_BT = advantage_BT - total.sum / jnp.maximum(total.weight, 1.0)
        square = masked_mean(jnp.square(centered_BT), mask_BT)
        deviation = jnp.sqrt(square.sum / jnp.maximum(square.weight, 1.0))
        return centered_BT / jnp.maximum(deviation, self.whiten_floor)


def _traces(
    value_MBT: Float[jax.Array, "M B T"],
    reward_BT: Float[jax.Array, "B T"],
    step_BT: Bool[jax.Array, "B T"],
    next_value_MB: Float[jax.Array, "M B"],
    gamma: float,
    lambda_: float,
) -> Float[jax.Array, "M B T"]:
    def body(carry, inputs):
        next_value_MB, trace_MB = carry
        value_MB, reward_B, step_B = inputs
        delta_MB = reward_B[None] + gamma * next_value_MB - value_MB
        stepped = (value_MB, delta_MB + gamma * lambda_ * trace_MB)
        carry = jax.tree.map(lambda new, old: jnp.where(step_B[None], new, old), stepped, carry)
        return carry, carry[1]

    inputs = (jnp.moveaxis(value_MBT, 2, 0), reward_BT.T, step_BT.T)
    _, trace_TMB = jax.lax.scan(body, (next_value_MB, jnp.zeros_like(next_value_MB)), inputs, reverse=True)
    return jnp.moveaxis(trace_TMB, 0, 2)
