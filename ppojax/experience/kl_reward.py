"""The KL penalty inside the reward."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ppojax.experience.batch import without_records
from ppojax.losses.kl import Estimator, kl_estimate
from ppojax.types import Experience


def penalize(experience: Experience, coefficient: float, estimator: Estimator) -> tuple[Experience, jax.Array]:
    """Subtract coefficient * KL(pi_old || ref) from the rewards; return also the mean over episodes of its k1 sum.

    r_t - coefficient * k(log pi_old(y_t) - log ref(y_t))          at each action t, k as in `kl_estimate`
    """
    reward_BT, kl = _penalized(without_records(experience), coefficient, estimator=estimator)
    return experience._replace(reward_BT=reward_BT), kl


@partial(jax.jit, static_argnames=("estimator",))
def _penalized(
    experience: Experience, coefficient: float | jax.Array, *, estimator: Estimator
) -> tuple[jax.Array, jax.Array]:
    e, old_BT, ref_BT = experience, experience.logp_old_BT, experience.logp_ref_BT
    assert old_BT is not None and ref_BT is not None, "a KL reward needs logp_old and logp_ref"

    def of_actions(name: Estimator) -> jax.Array:
        return jnp.where(e.action_BT, kl_estimate(old_BT, ref_BT, name), 0.0)

    episodes = jnp.sum(e.valid_B & (e.segment_B == 0), dtype=jnp.float32)
    return e.reward_BT - coefficient * of_actions(estimator), jnp.sum(of_actions("k1")) / jnp.maximum(episodes, 1.0)
