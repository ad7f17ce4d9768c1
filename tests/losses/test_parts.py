"""What a policy loss adds to its own objective: the entropy bonus with weights, imitation of what was good."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.losses import DPPO, Aggregation, KLReward
from ppojax.losses.entropy import EntropyControl
from ppojax.losses.policy import PolicyLoss
from ppojax.types import Batch, LossOut, TokenStats
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


def imitated(loss: PolicyLoss, score: list[float], **changes: jax.Array) -> tuple[LossOut, np.ndarray]:
    batch = loss.of_minibatch(batch_of(score_B=jnp.asarray(score), **changes))
    return loss(STATS, batch), np.asarray(jax.grad(lambda logp: loss(STATS._replace(logp=logp), batch).sum)(LOGP))


def test_imitation_is_a_mean_over_what_earned_enough() -> None:
    """By hand, -log pi of 1 and 2 in row 0, .5 in row 1: 0.3 times the mean over the tokens of the rows over .5.

    Row 1 alone: .3 * .5, a slope of -.3 at its one token. Both: .3 * 3.5 / 3, slopes of -.1. Nobody: nothing.
    """
    loss = DPPO(positive_nll=0.3, positive_from=0.5)
    for score, mean, slope in (
        ([0.5, 1.0], 0.15, [[0, 0, 0], [-0.3, 0, 0]]),
        ([1.0, 0.5], 0.45, [[-0.15, -0.15, 0], [0, 0, 0]]),
        ([1.0, 1.0], 0.35, [[-0.1, -0.1, 0], [-0.1, 0, 0]]),
        ([0.5, 0.5], 0.0, np.zeros((2, 3))),
    ):
        out, slopes = imitated(loss, score)
        np.testing.assert_allclose(out.sum / out.weight, mean, rtol=1e-6)
        np.testing.assert_allclose(slopes / out.weight, slope, rtol=1e-6, atol=1e-9)
        said = out.metrics["actor/positive_nll"]
        np.testing.assert_allclose(said.sum / said.weight, mean / 0.3, rtol=1e-6)


def test_imitation_is_averaged_as_the_loss_is() -> None:
    """Of row 0, mean by rows: (1 + 2) / 2 over one row; sums by rows: 3; over a constant of 4: 3 / 4."""
    for mode, mean in (("seq_mean_token_mean", 1.5), ("seq_mean_token_sum", 3.0), ("constant", 0.75)):
        how = Aggregation(mode=mode, constant=4.0 if mode == "constant" else None)
        out, _ = imitated(DPPO(positive_nll=1.0, aggregation=how), [1.0, 0.0])
        np.testing.assert_allclose(out.sum / out.weight, mean, rtol=1e-6)
    # Rows that are parts of one episode of 4 and of 2 tokens: 2/4 and 1/2 of a sequence.
    rows = DPPO(positive_nll=1.0, aggregation=Aggregation(mode="seq_mean_token_mean"))
    out, _ = imitated(rows, [1.0, 0.0], written_B=jnp.asarray([4.0, 2.0]))
    np.testing.assert_allclose(out.sum / out.weight, (3 / 4) / (2 / 4), rtol=1e-6)


def test_imitation_of_nothing_that_was_written() -> None:
    """Rows of which no token counts: no loss, no slope, no NaN."""
    experience = batch_of().experience
    none = experience._replace(action_BT=jnp.zeros((2, 3), bool))
    out, slopes = imitated(DPPO(positive_nll=0.3), [1.0, 1.0], experience=none)
    assert (float(out.sum), float(out.weight)) == (0, 0) and not slopes.any()
    first = experience._replace(action_BT=jnp.asarray([[0, 0, 0], [1, 0, 0]], bool))
    out, slopes = imitated(DPPO(positive_nll=0.3), [1.0, 0.0], experience=first)
    assert (float(out.sum), float(out.weight)) == (0, 1) and not slopes.any()


def test_imitation_must_know_the_minibatch() -> None:
    with pytest.raises(AssertionError, match="positive_nll needs to know the whole minibatch"):
        DPPO(positive_nll=0.3)(STATS, batch_of())
    with pytest.raises(AssertionError, match="positive_nll needs the rewards of episodes"):
        DPPO(positive_nll=0.3).of_minibatch(batch_of())


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
