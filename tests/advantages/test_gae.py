"""GAE against the hand rows of its docstring's rules and against a plain loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.advantages import GAE
from ppojax.types import Ending, Experience
from small_batch import experience_of

RULES = ("skip", "zero", "dense")
TRUNCATIONS = ("bootstrap", "zero", "mask_out")


def hand_row(ending: Ending = Ending.TERMINATED, value_after: float = 0.0) -> Experience:
    return experience_of(
        [[1, 1, 0, 1, 1, 0]],
        reward=[[0, 0, 0, 0, 1, 0]],
        length=[5],
        ending=[ending],
        value=[[[0.1, 0.2, 0.9, 0.4, 0.5, value_after]]],
    )


def loop(e: Experience, rule: str, truncation: str, gamma: float, lambda_policy: float, lambda_value: float):
    """GAE as one would write it on paper, in float64: the positions that count are listed, then walked backwards."""
    value, reward = np.asarray(e.value_MBT, np.float64), np.asarray(e.reward_BT, np.float64)
    action, length, ending = np.asarray(e.action_BT), np.asarray(e.length_B), np.asarray(e.ending_B)
    M, B, T = value.shape
    advantage, target = np.zeros((B, T)), np.zeros((M, B, T))

    def walk(v, b, after, lam):
        places = [t for t in range(length[b]) if rule != "skip" or action[b, t]]
        trace, following, out = 0.0, after, {}
        for t in places[::-1]:
            now = 0.0 if rule == "zero" and not action[b, t] else v[t]
            trace = reward[b, t] + gamma * following - now + gamma * lam * trace
            out[t], following = trace, now
        return out

    for b in range(B):
        bootstrap = ending[b] == Ending.CUT or (ending[b] == Ending.TRUNCATED and truncation == "bootstrap")
        after = value[:, b, length[b]] if bootstrap else np.zeros(M)
        dropped = ending[b] == Ending.TRUNCATED and truncation == "mask_out"
        for t, a in walk(value[:, b].mean(0), b, after.mean(), lambda_policy).items():
            if action[b, t] and not dropped:
                advantage[b, t] = a
        for m in range(M):
            for t, a in walk(value[m, b], b, after[m], lambda_value).items():
                if action[b, t]:
                    target[m, b, t] = value[m, b, t] + (0.0 if dropped else a)
    return advantage, target


def ragged(seed: int, M: int = 2, B: int = 7, T: int = 13) -> Experience:
    """Rows of random lengths, masks, endings; what lies beyond a row's bootstrap value is NaN."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, T, B)
    ending = [Ending.TERMINATED, Ending.TRUNCATED, Ending.CUT, *rng.integers(0, 2, B - 3)]
    inside = np.arange(T)[None] < length[:, None]
    action = (rng.random((B, T)) < 0.6) & inside
    action[-1] = False
    value = rng.normal(size=(M, B, T))
    value[:, np.arange(T)[None] > length[:, None]] = np.nan
    return experience_of(
        action, reward=np.where(action, rng.normal(size=(B, T)), 0), length=length, ending=ending, value=value
    )


@pytest.mark.parametrize(
    ("rule", "lambda_policy", "expected"),
    [
        ("skip", 1.0, [0.9, 0.8, 0, 0.6, 0.5]),
        ("zero", 1.0, [0.9, 0.8, 0, 0.6, 0.5]),
        ("dense", 1.0, [0.9, 0.8, 0, 0.6, 0.5]),
        ("skip", 0.95, [0.8089, 0.7463, 0, 0.575, 0.5]),
        ("zero", 0.95, [0.7640, 0.6989, 0, 0.575, 0.5]),
        ("dense", 0.95, [0.8067, 0.7439, 0, 0.575, 0.5]),
    ],
)
def test_hand_row(rule, lambda_policy, expected):
    out = GAE(mask_rule=rule, lambda_policy=lambda_policy)(hand_row())
    # The expected figures carry four decimals.
    np.testing.assert_allclose(out.advantage_BT[0, :5], expected, atol=5.1e-5)
    np.testing.assert_allclose(out.return_MBT[0, 0], [1, 1, 0, 1, 1, 0], atol=1e-6)


@pytest.mark.parametrize(("truncation", "after"), [("bootstrap", 0.7), ("zero", 0.0)])
def test_truncated_hand_row(truncation, after):
    """The value 0.7 behind the row's last token counts as what is still to come, or nothing does."""
    out = GAE(truncation=truncation)(hand_row(Ending.TRUNCATED, 0.7))
    last = 1 + after - 0.5
    before = 0.5 - 0.4 + 0.95 * last
    np.testing.assert_allclose(out.advantage_BT[0, 3:5], [before, last], rtol=1e-6)
    np.testing.assert_allclose(out.return_MBT[0, 0, [0, 1, 3, 4]], 1 + after, rtol=1e-6)


def test_masked_out_hand_row():
    out = GAE(truncation="mask_out")(hand_row(Ending.TRUNCATED, 0.7))
    np.testing.assert_array_equal(out.advantage_BT, 0)
    np.testing.assert_allclose(out.return_MBT[0, 0], [0.1, 0.2, 0, 0.4, 0.5, 0], rtol=1e-6)


def test_terminated_row_ignores_the_value_behind_it():
    plain, other = GAE()(hand_row()), GAE()(hand_row(value_after=100.0))
    np.testing.assert_array_equal(plain.advantage_BT, other.advantage_BT)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_against_a_loop(rule, truncation):
    estimator = GAE(mask_rule=rule, truncation=truncation, gamma=0.9, lambda_policy=0.8, lambda_value=0.6)
    run = jax.jit(estimator.__call__)
    for seed in range(4):
        e = ragged(seed)
        out = run(e)
        advantage, target = loop(e, rule, truncation, 0.9, 0.8, 0.6)
        # float32 sums of at most 13 terms of order 1
        np.testing.assert_allclose(out.advantage_BT, advantage, atol=5e-6)
        np.testing.assert_allclose(out.return_MBT, target, atol=5e-6)


def test_lambda_one_returns_are_the_rewards_to_come():
    e = ragged(11)._replace(ending_B=jnp.zeros(7, jnp.int32))
    out = GAE()(e)
    to_come = np.cumsum(np.asarray(e.reward_BT)[:, ::-1], axis=1)[:, ::-1] * np.asarray(e.action_BT)
    np.testing.assert_allclose(out.return_MBT, np.broadcast_to(to_come, (2, 7, 13)), atol=5e-6)


def test_fractional_rewards_survive():
    e = hand_row()._replace(reward_BT=jnp.asarray([[0, 0, 0, 0, 0.3, 0]]), value_MBT=jnp.zeros((1, 1, 6)))
    out = GAE(lambda_policy=1.0)(e)
    assert out.advantage_BT.dtype == jnp.float32
    np.testing.assert_array_equal(out.advantage_BT[0, :5], np.float32([0.3, 0.3, 0, 0.3, 0.3]))


def test_whitening():
    e = ragged(3)
    raw, white = GAE()(e), GAE(whiten="batch")(e)
    mask = np.asarray(e.action_BT)
    x = np.asarray(raw.advantage_BT, np.float64)[mask]
    np.testing.assert_allclose(np.asarray(white.advantage_BT)[mask], (x - x.mean()) / x.std(), atol=1e-5)
    np.testing.assert_array_equal(white.advantage_BT[~mask], 0)
    np.testing.assert_array_equal(white.return_MBT, raw.return_MBT)


def test_whitening_does_not_blow_up_noise():
    """Equal rewards and values that are off by 0.01: the advantages stay within 0.2 of 0 instead of reaching 1."""
    noise = 0.01 * np.asarray([[[1.0, -1, 1, -1, 1, 0]]])
    e = experience_of([[1, 1, 1, 1, 1, 0]], value=noise)
    white = GAE(whiten="batch", lambda_policy=0.0)(e).advantage_BT
    assert 0 < np.abs(white).max() < 0.25


def test_nothing_to_learn_from():
    out = GAE(whiten="batch")(experience_of([[0, 0, 0]], value=[[[1.0, 2.0, 3.0]]]))
    np.testing.assert_array_equal(out.advantage_BT, 0)
    np.testing.assert_array_equal(out.return_MBT, 0)


def test_no_gradient_reaches_the_values():
    def total(value_MBT):
        out = GAE()(hand_row()._replace(value_MBT=value_MBT))
        return out.advantage_BT.sum() + out.return_MBT.sum()

    np.testing.assert_array_equal(jax.grad(total)(hand_row().value_MBT), 0)


def test_a_row_without_room_for_its_bootstrap_value_is_not_silent():
    e = experience_of([[1, 1]], length=[2], ending=[Ending.TRUNCATED], value=[[[0.5, 0.5]]])
    assert np.isnan(GAE()(e).advantage_BT).any()


def test_values_are_needed():
    with pytest.raises(AssertionError, match="GAE needs the critics' values"):
        GAE()(experience_of([[1, 0]]))
