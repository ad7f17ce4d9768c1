"""Rewards on another scale than the environment's."""

from __future__ import annotations

from pydantic import Field, model_validator

from ppojax.advantages.chain import Chains, score_of_episodes
from ppojax.component import Component
from ppojax.lazy import Float, jax, jnp
from ppojax.types import Ending, Experience


class RewardScaling(Component):
    """Moves the sum of an episode's rewards from one range to another, as NeMo-RL's `reward_scaling`."""

    source_min: float = Field(default=0.0, description="sum of an episode's rewards, or less, that becomes target_min")
    source_max: float = Field(default=1.0, description="sum, or more, that becomes target_max")
    target_min: float = Field(default=-1.0, description="lowest sum that is learned from")
    target_max: float = Field(default=1.0, description="highest sum that is learned from")

    @model_validator(mode="after")
    def _in_order(self) -> RewardScaling:
        for end, low, high in (
            ("source", self.source_min, self.source_max),
            ("target", self.target_min, self.target_max),
        ):
            if not low < high:
                raise ValueError(f"reward_scaling: {end}_min ({low}) must be under {end}_max ({high})")
        return self

    def __call__(self, e: Experience, *, bootstraps: bool) -> Float[jax.Array, "B T"]:
        """Scale rewards; `bootstraps` says that a truncated episode goes on with a value, which is on the new scale.

            r_t' = s r_t,  s = (target_max - target_min) / (source_max - source_min)
            at the episode's last action also  s (clip(R, source_min, source_max) - R) + target_min - s source_min

        with R the sum of the rewards r of its rows, so that the sum of r' is in the target's range. What goes on with a
        value gets no such last part, nor does an episode without an action.
        """
        low, high = self.source_min, self.source_max
        scale = (self.target_max - self.target_min) / (high - low)
        total_B = score_of_episodes(e)
        extra_B = scale * (jnp.clip(total_B, low, high) - total_B) + (self.target_min - scale * low)
        acts_B, chains = e.action_BT.any(axis=1), Chains.of(e)
        goes_on_B = (e.ending_B == Ending.CUT) & ~chains.linked_B
        if bootstraps:
            goes_on_B |= e.ending_B == Ending.TRUNCATED
        # Of each episode's rows with an action the last one, unless what follows it is a value.
        ends_B = acts_B & ~goes_on_B & ~(chains.later_BB & (acts_B | goes_on_B)[None, :]).any(axis=1)
        done_BT = jnp.cumsum(e.action_BT, axis=1) == jnp.sum(e.action_BT, axis=1, keepdims=True)
        return scale * e.reward_BT + jnp.where(e.action_BT & done_BT & ends_B[:, None], extra_B[:, None], 0.0)
