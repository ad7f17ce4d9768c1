"""The KL inside the reward, by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.experience.kl_reward import penalize
from ppojax.losses.kl import Estimator
from small_batch import experience_of

ACTION = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
OLD = [[0, -1.0, -2.0, 0], [0, -3.0, 0, 0], [0, 0, 0, 0]]
REF = [[-9, -1.5, -1.0, -9], [-9, -3.0, -9, -9], [-9, -9, -9, -9]]
REWARD = [[0, 0, 1.0, 0], [0, 0.5, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [("k1", [[0.5, -1.0], [0.0]]), ("k2", [[0.125, 0.5], [0.0]]), ("k3", [[np.exp(-0.5) - 0.5, np.e - 2], [0.0]])],
)
def test_by_hand(estimator: Estimator, kl: list[list[float]]) -> None:
    """x = log old - log ref is .5, -1 and 0; the second row's episode has a later segment, the third is not valid."""
    experience = experience_of(ACTION, reward=REWARD, old=OLD, ref=REF, valid=[True, True, False])
    experience = experience._replace(segment_B=jnp.asarray([0, 1, 0], jnp.int32))
    got, mean = penalize(experience, 0.2, estimator)
    want = np.asarray(REWARD)
    want[0, 1:3] -= 0.2 * np.asarray(kl[0])
    np.testing.assert_allclose(got.reward_BT, want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(mean, -0.5, rtol=1e-6)  # k1 of one episode
    assert got.recorded == experience.recorded
    np.testing.assert_array_equal(penalize(experience, 0.0, estimator)[0].reward_BT, REWARD)
