"""The KL inside the reward, by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.advantages import Group
from ppojax.experience.batch import make_batch
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


def test_episodes_are_judged_by_what_they_earned() -> None:
    """Not by what the penalty left of it: a KL below zero makes no success of a failure."""
    experience = experience_of(
        [[1, 1], [1, 0]], reward=[[0, 0], [0.5, 0]], old=[[-2, -2], [-2, 0]], ref=[[-1, -1], [-1, 0]]
    )
    penalized, _ = penalize(experience, 0.1, "k1")
    np.testing.assert_allclose(penalized.reward_BT, [[0.1, 0.1], [0.6, 0]], rtol=1e-6)
    estimator = Group(scale="none", baseline="none")
    judged = make_batch(penalized, estimator=estimator, earned_BT=experience.reward_BT)
    np.testing.assert_array_equal(np.asarray(judged.score_B), [0, 0.5])
    np.testing.assert_allclose(judged.advantage_BT, [[0.2, 0.2], [0.6, 0]], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(make_batch(penalized, estimator=estimator).score_B), [0.2, 0.6], rtol=1e-6)
