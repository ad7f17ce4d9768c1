"""Rewards of scored rows on another scale."""

from __future__ import annotations

from functools import partial

import jax

from ppojax.advantages.reward_scaling import RewardScaling
from ppojax.experience.batch import without_records
from ppojax.types import Experience


def scale(experience: Experience, settings: RewardScaling | None, *, bootstraps: bool) -> Experience:
    """Scale the rewards, where that is asked for (see `RewardScaling`)."""
    if settings is None:
        return experience
    return experience._replace(reward_BT=_scaled(without_records(experience), settings=settings, bootstraps=bootstraps))


@partial(jax.jit, static_argnames=("settings", "bootstraps"))
def _scaled(experience: Experience, *, settings: RewardScaling, bootstraps: bool) -> jax.Array:
    return settings(experience, bootstraps=bootstraps)
