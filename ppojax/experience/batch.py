"""From scored experience to a batch: the one place where an advantage estimator runs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ppojax.advantages import AdvantageEstimator
from ppojax.advantages.chain import score_of_episodes, written_in_episodes
from ppojax.types import Advantage, Batch, Experience, Recorded


def make_batch(
    experience: Experience,
    *,
    estimator: AdvantageEstimator,
    earned_BT: jax.Array | None = None,
    entropy_scale: float | None = None,
) -> Batch:
    """Estimate advantages, and returns where critics are trained.

    Args:
        experience: scored rows.
        estimator: of advantages.
        earned_BT: rewards as the environment gave them, by which episodes are judged; None for those of the experience.
        entropy_scale: times the entropy bonus of every token; None for a bonus that stays as it is.
    """
    out, score_B, written_B = _estimate(without_records(experience), earned_BT, estimator=estimator)
    entropy_BT = None
    if entropy_scale is not None or out.explored_BT is not None:
        explored_BT = jnp.ones_like(experience.action_BT) if out.explored_BT is None else out.explored_BT
        entropy_BT = explored_BT.astype(jnp.float32) * jnp.float32(1.0 if entropy_scale is None else entropy_scale)
    return Batch(experience, out.advantage_BT, out.return_MBT, score_B, entropy_BT, written_B)


@partial(jax.jit, static_argnames=("estimator",))
def _estimate(
    experience: Experience, earned_BT: jax.Array | None, *, estimator: AdvantageEstimator
) -> tuple[Advantage, jax.Array, jax.Array]:
    judged = experience if earned_BT is None else experience._replace(reward_BT=earned_BT)
    return estimator(experience), score_of_episodes(judged), written_in_episodes(experience)


def without_records(experience: Experience) -> Experience:
    """Leave out the large arrays that only the policy's update reads."""
    return experience._replace(recorded=Recorded(), hidden_ref_BAD=None)
