"""Experience and batches written out by hand, a few rows of a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppojax.types import Batch, Ending, Experience


def experience_of(
    action: Any,
    *,
    reward: Any = None,
    length: Sequence[int] | None = None,
    ending: Sequence[Ending] | None = None,
    valid: Sequence[bool] | None = None,
    group: Sequence[int] | None = None,
    value: Any = None,
    behavior: Any = None,
    old: Any = None,
    ref: Any = None,
) -> Experience:
    """Rows with `action[b][t]` and what else is given; rewards and log-probabilities are 0 where they are not."""
    action_BT = np.asarray(action, bool)
    B, T = action_BT.shape

    def per_row(x: Any, default: int) -> jax.Array:
        return jnp.asarray(np.full(B, default, np.int32) if x is None else np.asarray(x, np.int32))

    def per_token(x: Any) -> jax.Array:
        return jnp.asarray(np.zeros((B, T), np.float32) if x is None else np.asarray(x, np.float32))

    index_BA = np.zeros((B, T), np.int32)
    for b in range(B):
        places = np.flatnonzero(action_BT[b])
        index_BA[b, : len(places)] = places
    return Experience(
        token_BT=jnp.asarray(np.zeros((B, T), np.int32)),
        length_B=per_row(length, T - 1),
        prefix_B=per_row(None, 0),
        action_BT=jnp.asarray(action_BT),
        action_index_BA=jnp.asarray(index_BA),
        logp_behavior_BT=per_token(behavior),
        reward_BT=per_token(reward),
        ending_B=per_row(ending, Ending.TERMINATED),
        valid_B=jnp.asarray(np.ones(B, bool) if valid is None else np.asarray(valid, bool)),
        group_B=per_row(group, 0),
        episode_B=jnp.asarray(np.arange(B, dtype=np.int32)),
        segment_B=per_row(None, 0),
        logp_old_BT=None if old is None else per_token(old),
        logp_ref_BT=None if ref is None else per_token(ref),
        value_MBT=None if value is None else jnp.asarray(np.asarray(value, np.float32)),
    )


def token_row(advantage: Sequence[float], **logp: Any) -> Batch:
    """One row of tokens, all of them actions, with their advantages and `behavior`, `old`, `ref` log-probabilities."""
    experience = experience_of([[True] * len(advantage)], **{name: [list(x)] for name, x in logp.items()})
    return Batch(experience, jnp.asarray(np.asarray([list(advantage)], np.float32)))


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Rows start..stop of a batch, as a microbatch takes them."""
    batch = jax.device_get(batch)
    part = jax.tree.map(lambda x: jnp.asarray(x[start:stop]), batch._replace(return_MBT=None))
    experience = part.experience
    if batch.experience.value_MBT is not None:
        experience = experience._replace(value_MBT=jnp.asarray(batch.experience.value_MBT[:, start:stop]))
    targets = None if batch.return_MBT is None else jnp.asarray(batch.return_MBT[:, start:stop])
    return Batch(experience, part.advantage_BT, targets)
