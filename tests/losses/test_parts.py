"""What a policy loss adds to its own objective: the entropy bonus with weights, imitation of what was good."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.losses import DPPO, KLReward
from ppojax.losses.entropy import EntropyControl
from ppojax.types import Batch, TokenStats
from small_batch import experience_of

ACTION = [[1, 1, 0], [1, 0, 0]]
LOGP = jnp.asarray([[-1.0, -2.0, -9.0], [-0.5, -9.0, -9.0]])
STATS = TokenStats(LOGP, jnp.asarray([[0.3, 0.7, 9.0], [0.2, 9.0, 9.0]]))


def batch_of(**changes: jax.Array) -> Batch:
    experience = experience_of(ACTION, behavior=LOGP)
    return Batch(experience, jnp.zeros((2, 3)))._replace(**changes)


def test_the_bonus_has_a_weight_for_each_token() -> None:
    """Sum of -0.1 w H: .03 + .07 + .02 without weights."""
    loss = DPPO(entropy_coefficient=0.1)
    np.testing.assert_allclose(loss(STATS, batch_of()).sum, -0.12, rtol=1e-6)
    weighted = batch_of(entropy_BT=jnp.asarray([[0.0, 2.0, 5.0], [1.0, 5.0, 5.0]]))
    np.testing.assert_allclose(loss(STATS, weighted).sum, -0.16, rtol=1e-6)
    slope = jax.grad(lambda h: loss(STATS._replace(entropy=h), weighted).sum)(STATS.entropy)
    np.testing.assert_allclose(slope, [[0, -0.2, 0], [-0.1, 0, 0]], rtol=1e-6)


def test_only_what_earned_enough_is_imitated() -> None:
    """Row 1 earned 1, row 0 only 0.5: its -log pi of 0.5 counts, with a slope of -0.3 / weight."""
    loss = DPPO(positive_nll=0.3, positive_from=0.5)
    batch = batch_of(score_B=jnp.asarray([0.5, 1.0]))
    out = loss(STATS, batch)
    np.testing.assert_allclose((out.sum, out.weight), (0.15, 3), rtol=1e-6)
    np.testing.assert_allclose(out.metrics["actor/positive_nll"], (0.5, 3), rtol=1e-6)
    slope = jax.grad(lambda logp: loss(STATS._replace(logp=logp), batch).sum)(LOGP)
    np.testing.assert_allclose(slope, [[0, 0, 0], [-0.3, 0, 0]], rtol=1e-6)
    assert float(loss(STATS, batch_of(score_B=jnp.asarray([0.5, 0.5]))).sum) == 0
    with pytest.raises(AssertionError, match="positive_nll needs the rewards of episodes"):
        loss(STATS, batch_of())


def test_the_entropy_control() -> None:
    control = EntropyControl(target=0.5, step=0.25, largest=1.5)
    assert [control.next(1.0, h) for h in (0.4, 0.5, 0.6)] == [1.25, 0.75, 0.75]
    assert (control.next(1.4, 0.1), control.next(0.1, 0.9)) == (1.5, 0.0)


def test_the_kl_control() -> None:
    """error = kl / target - 1, held within +-0.2; 100 episodes of a horizon of 1000."""
    control = KLReward(coefficient=0.1, target=2.0, horizon=1000)
    np.testing.assert_allclose(
        [control.next(0.1, kl, 100) for kl in (2.2, 9.0, 1.9, 0.0)], [0.101, 0.102, 0.0995, 0.098]
    )
    assert KLReward(coefficient=0.1).next(0.1, 9.0, 100) == 0.1
