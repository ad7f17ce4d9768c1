"""A bounded value head has to hold every return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ppojax.models.value_head import LinearHead
from ppojax.settings import Contradiction

if TYPE_CHECKING:
    from ppojax.config.root import Config


def bounds(config: Config) -> Iterator[Contradiction]:
    """Compare the range of a critic's head with that of the rewards, or ask for one where nothing is known of them."""
    head, rewards = config.critic.head, config.env.reward_range
    if isinstance(head, LinearHead):
        return
    keys = ("critic.head.type", "critic.head.low", "critic.head.high")
    if config.reward_scaling is not None:
        keys = (*keys, "reward_scaling")
        rewards = (config.reward_scaling.target_min, config.reward_scaling.target_max)
    if config.kl_reward is not None:
        keys, rewards = (*keys, "kl_reward"), None
    if rewards is None:
        if not {"low", "high"} <= head.model_fields_set:
            yield Contradiction(
                (*keys, "env.type"),
                "the head is bounded, and what an episode can earn is not known",
                "set critic.head.low and critic.head.high to the lowest and highest sum of rewards, or "
                "critic.head.type=linear",
            )
    elif rewards[0] < head.low or rewards[1] > head.high:
        yield Contradiction(
            (*keys, "env.type"),
            f"episodes earn {rewards[0]:g} to {rewards[1]:g}, which the head cannot say",
            f"set critic.head.low to {rewards[0]:g} or less and critic.head.high to {rewards[1]:g} or more",
        )
