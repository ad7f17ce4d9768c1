"""Advantages from the other rollouts of the same prompt, without a critic."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ppojax.advantages.chain import Chains, earned, over_rows
from ppojax.advantages.whiten import whiten
from ppojax.component import Component
from ppojax.lazy import Bool, Float, Int, jax, jnp
from ppojax.types import Advantage, Experience


class Group(Component):
    """Return of an episode against its group's: GRPO (mean, std), Dr.GRPO (mean, none), RLOO (leave_one_out, none).

    Without a group, REINFORCE (baseline=none, scale=none). REINFORCE++ is that with rewards=to_go and whiten=batch, and
    with baseline=mean its variant for groups.
    """

    needs_values: ClassVar[bool] = False
    bootstraps: ClassVar[bool] = False  # a truncated episode has what it has earned
    gamma: ClassVar[float] = 1.0  # a return is the plain sum of an episode's rewards

    type: Literal["group"] = "group"
    baseline: Literal["mean", "leave_one_out", "none"] = Field(
        default="mean", description="mean: of the whole group; leave_one_out: of its other episodes; none: 0"
    )
    scale: Literal["std", "none"] = Field(
        default="std", description="std: divide by the group's standard deviation (n - 1)"
    )
    epsilon: float = Field(default=1e-6, ge=0, description="added to the standard deviation")
    rewards: Literal["episode", "to_go"] = Field(
        default="episode",
        description="what a token is credited with: episode: all rewards of its episode; to_go: those from it on "
        "(REINFORCE++), which differ where rewards lie inside an episode, as with a KL in the reward",
    )
    whiten: Literal["off", "batch"] = Field(
        default="off", description="batch: advantages to mean 0 and deviation 1 over the batch's tokens (REINFORCE++)"
    )
    whiten_floor: float = Field(default=1e-4, gt=0, description="smallest deviation to divide by")

    @model_validator(mode="after")
    def _a_group_to_scale_by(self) -> Group:
        if self.scale == "std" and self.baseline == "none":
            raise ValueError("group: scale=std needs a group, which baseline=none leaves out; set scale=none")
        if self.scale == "std" and self.rewards == "to_go":
            raise ValueError("group: scale=std is of whole episodes, and rewards=to_go of parts; set scale=none")
        return self

    def __call__(self, experience: Experience) -> Advantage:
        """Compare each episode's return R (the sum of its rewards) with the n valid episodes of its group.

            mean            A = R - mean(R)                      (arXiv 2402.03300, section 4.1.2)
            leave_one_out   A = R - mean of the others           = n / (n - 1) (R - mean(R))     (arXiv 2402.14740)
            none            A = R                                (Williams 1992)
            scale = std     A / (std(R) + epsilon)
            to_go           A less the rewards before the token                                  (arXiv 2501.03262)
            whiten = batch  (A - mean(A)) / max(std(A), whiten_floor), over action tokens        (arXiv 2501.03262)

        With `episode` A is the same on all action tokens of an episode, in all its rows where it was cut. It is 0 off
        action and for rows that are not valid, which leave the statistics. Under a baseline, A before `to_go` and
        `whiten` is 0 for a group of one, and for a group whose returns are all equal. There is no critic target.
        Stop-gradiented.
        """
        experience = jax.lax.stop_gradient(experience)
        chains, valid_B = Chains.of(experience), experience.valid_B
        episode_BB = chains.later_BB | chains.later_BB.T | jnp.eye(len(valid_B), dtype=bool)
        first_B = valid_B & ~chains.later_BB.any(axis=0)
        return_B = over_rows(episode_BB, earned(experience))
        advantage_B = self._advantage(return_B, first_B, experience.group_B)
        mask_BT = experience.action_BT & valid_B[:, None]
        advantage_BT = jnp.broadcast_to(advantage_B[:, None], mask_BT.shape)
        if self.rewards == "to_go":
            advantage_BT = advantage_BT - _rewards_before(experience, chains)
        if self.whiten == "batch":
            advantage_BT = whiten(advantage_BT, mask_BT, self.whiten_floor)
        return Advantage(jnp.where(mask_BT, advantage_BT, 0.0))

    def _advantage(
        self, return_B: Float[jax.Array, " B"], counted_B: Bool[jax.Array, " B"], group_B: Int[jax.Array, " B"]
    ) -> Float[jax.Array, " B"]:
        """Advantages of all rows by the statistics of those that are counted, one of each episode."""
        if self.baseline == "none":
            return return_B
        rows = return_B.shape[0]
        # Group ids may be any integers; within the batch there are at most as many groups as rows.
        _, index_B = jnp.unique(group_B, return_inverse=True, size=rows)

        def over_group(x_B: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(jnp.where(counted_B, x_B, 0.0), index_B, num_segments=rows)[index_B]

        count_B = over_group(jnp.ones_like(return_B))
        centered_B = return_B - over_group(return_B) / jnp.maximum(count_B, 1.0)
        others_B = jnp.maximum(count_B - 1.0, 1.0)
        advantage_B = centered_B
        if self.baseline == "leave_one_out":
            advantage_B = centered_B * count_B / others_B
        if self.scale == "std":
            deviation_B = jnp.sqrt(over_group(jnp.square(centered_B)) / others_B)
            advantage_B = advantage_B / jnp.maximum(deviation_B + self.epsilon, jnp.finfo(jnp.float32).tiny)
        # Exact, where a mean that does not round to the common return would leave a residue to be scaled up.
        top_B = jax.ops.segment_max(jnp.where(counted_B, return_B, -jnp.inf), index_B, num_segments=rows)[index_B]
        low_B = jax.ops.segment_min(jnp.where(counted_B, return_B, jnp.inf), index_B, num_segments=rows)[index_B]
        return jnp.where(top_B > low_B, advantage_B, 0.0)


def _rewards_before(e: Experience, chains: Chains) -> Float[jax.Array, "B T"]:
    """Rewards of the episode before each token, those of earlier rows among them."""
    reward_BT = jnp.where(e.action_BT, e.reward_BT, 0.0)
    earlier_B = over_rows(chains.later_BB.T, jnp.sum(reward_BT, axis=1))
    return earlier_B[:, None] + jnp.cumsum(reward_BT, axis=1) - reward_BT
