"""The numbers of the log, by their formulas."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import jax
import numpy as np
import pytest

from ppojax.advantages.chain import Chains
from ppojax.experience import summary
from ppojax.experience.summary import advantage_metrics, rollout_metrics, to_go
from ppojax.types import Batch, Ending, Row
from small_batch import experience_of

ACTION = [[0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
REWARD = [[0, 0.5, 0, 9, 0.25, 0], [0, 0, 0.1, 0, 0, 0], [0, 0, 0, 0, 0, 7]]
EPISODES = count()


def test_returns_run_over_actions_only() -> None:
    got = to_go(np.array(REWARD, np.float32), np.array(ACTION, bool), 0.5)
    np.testing.assert_allclose(got[0, [1, 2, 4]], [0.5 + 0.5 * (0.5 * 0.25), 0.5 * 0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(got[1, 2], 0.1, rtol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_explained_variance_is_of_the_monte_carlo_return_over_all_tokens(gamma: float) -> None:
    """1 - Var[G - V] / Var[G], V the mean of the critics; not a mean over rows, and nothing off action counts."""
    rng = np.random.default_rng(0)
    value_MBT = np.where(ACTION, rng.normal(size=(2, 3, 6)), 1e6)
    experience = experience_of(ACTION, reward=REWARD, value=value_MBT)
    advantage_BT = np.where(ACTION, rng.normal(size=(3, 6)), np.nan).astype(np.float32)
    got = advantage_metrics(Batch(experience, advantage_BT), gamma)
    mask = np.array(ACTION, bool)
    G = np.array([0.5 + gamma * gamma * 0.25, gamma * 0.25, 0.25, 0.1])
    V = value_MBT.mean(0)[mask]
    assert got["critic/vf_explained_var"] == pytest.approx(1 - np.var(G - V) / np.var(G), rel=1e-5)
    assert got["critic/value_error/rms"] == pytest.approx(np.sqrt(np.mean((G - V) ** 2)), rel=1e-5)
    assert got["critic/returns/mean"] == pytest.approx(G.mean(), rel=1e-6)
    assert got["critic/values/mean"] == pytest.approx(V.mean(), rel=1e-5)
    assert got["critic/values/std"] == pytest.approx(V.std(), rel=1e-5)
    assert got["critic/values/max"] == pytest.approx(V.max(), rel=1e-5)
    assert got["critic/returns/min"] == pytest.approx(G.min(), rel=1e-6)
    assert got["critic/advantages/mean"] == pytest.approx(advantage_BT[mask].mean(), rel=1e-5)


def test_only_what_is_read_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[object] = []

    def fetch(tree: object) -> object:
        fetched.extend(jax.tree.leaves(tree))
        return jax.device_get(tree)

    monkeypatch.setattr(summary, "fetch", fetch)
    experience = experience_of(ACTION, reward=REWARD, value=np.zeros((1, 3, 6), np.float32))
    assert advantage_metrics(Batch(experience, np.zeros((3, 6), np.float32)), 1.0)
    assert len(fetched) == len(summary.READ) + 1
    assert not any(x is experience.token_BT or x is experience.logp_behavior_BT for x in fetched)


def test_explained_variance_of_a_perfect_and_of_an_ignorant_critic() -> None:
    returns_BT = to_go(np.array(REWARD, np.float32), np.array(ACTION, bool), 1.0)

    def explained(value_BT: np.ndarray) -> float | None:
        experience = experience_of(ACTION, reward=REWARD, value=value_BT[None])
        return advantage_metrics(Batch(experience, np.zeros((3, 6), np.float32)), 1.0).get("critic/vf_explained_var")

    assert explained(returns_BT) == pytest.approx(1.0)
    assert explained(returns_BT + 3) == pytest.approx(1.0)  # an offset is not unexplained variance
    assert explained(np.full((3, 6), 0.4, np.float32)) == pytest.approx(0.0, abs=1e-6)
    assert explained(-returns_BT) == pytest.approx(-3.0)


def row_of(info: dict, ending: Ending = Ending.TERMINATED) -> Row:
    n = np.zeros(2, np.float32)
    return Row(n.astype(np.int32), n.astype(bool), n, n, 0, next(EPISODES), 0, ending, info=info)


def test_parts_of_rewards_are_logged() -> None:
    """Mean over the rows that have the part; a failed row is out."""
    infos = [{"reward/exact": 1.0, "failed/exact": 0.0}, {"reward/exact": 0.0, "failed/exact": 1.0}, {"turns": 3}, {}]
    got = rollout_metrics([*map(row_of, infos), row_of({"reward/exact": 9.0}, Ending.ERROR)])
    parts = {name: got[name] for name in ("reward/exact", "failed/exact")}
    assert parts == {"reward/exact": 0.5, "failed/exact": 0.5} and "turns" not in got


def test_returns_that_do_not_vary_explain_nothing() -> None:
    experience = experience_of([[1, 1, 0]], reward=[[0, 0.5, 0]], value=[[[0.3, 0.1, 0]]])
    batch = Batch(experience, np.zeros((1, 3), np.float32))
    assert "critic/vf_explained_var" not in advantage_metrics(batch, 1.0)
    assert advantage_metrics(Batch(experience_of([[0, 0]]), np.zeros((1, 2), np.float32)), 1.0) == {}


def row(reward: float, written: int, prompt: int, group: int, ending: Ending, **info: object) -> Row:
    action = np.repeat([False, True], [prompt, written])
    rewards = np.zeros(prompt + written, np.float32)
    rewards[-1] = reward
    zeros = np.zeros(prompt + written)
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    token, logp = zeros.astype(np.int32), zeros.astype(np.float32)
    return Row(token, action, logp, rewards, group, next(EPISODES), 0, ending, messages, dict(info))


def test_rollout_metrics() -> None:
    rows = [
        row(1.0, 4, 3, 0, Ending.TERMINATED, success=True),
        row(0.5, 2, 3, 0, Ending.TRUNCATED),
        row(0.25, 6, 5, 1, Ending.TERMINATED),
        row(0.25, 8, 5, 1, Ending.TERMINATED),
        row(99.0, 99, 9, 1, Ending.ERROR, success=True),
    ]
    got = rollout_metrics(rows)
    assert got == {
        "reward/mean": 0.5,
        "reward/std": pytest.approx(np.std([1, 0.5, 0.25, 0.25])),
        "reward/max": 1.0,
        "reward/min": 0.25,
        "reward/success": 0.25,
        "reward/frac_zero_std": 0.5,
        "response_length/mean": 5.0,
        "response_length/max": 8.0,
        "response_length/min": 2.0,
        "response_length/clip_ratio": 0.25,
        "prompt_length/mean": 4.0,
        "prompt_length/max": 5.0,
        "prompt_length/min": 3.0,
        "response/distinct_2": 1 / 16,
        "num_turns/mean": 1.0,
        "error/frac": pytest.approx(0.2),
    }
    assert rollout_metrics(rows[-1:]) == {"error/frac": 1.0}  # no reward is not a reward of 0


def test_turns_are_those_of_the_policy_and_clipped_ones_count() -> None:
    """Messages of an example in the prompt are nobody's turns; a turn at its limit counts however the row ended."""
    plain = row(1.0, 4, 3, 0, Ending.TERMINATED)
    action = np.array([0, 0, 1, 1, 0, 1, 1], bool)
    messages = [{"role": "assistant", "content": ""}] * 9
    two = replace(plain, episode=next(EPISODES), action=action, messages=messages)
    got = rollout_metrics([two, Row(**{**vars(plain), "clipped": True})])
    assert got["num_turns/mean"] == 1.5 and got["response_length/clip_ratio"] == 0.5


def test_episodes_count_once_however_many_rows_they_have() -> None:
    """Sums over an episode's rows; the first one's prompt, the last one's info and ending; nothing of failed ones."""
    first, second, third = row(0.5, 4, 3, 0, Ending.CUT), row(0.25, 2, 9, 0, Ending.CUT), row(1.0, 6, 7, 0, Ending(1))
    chain = [replace(r, episode=7, segment=s, info={"success": s == 2}) for s, r in enumerate((first, second, third))]
    whole = row(0.75, 8, 5, 0, Ending.TERMINATED)
    failed = [replace(r, episode=8, segment=s, ending=Ending.ERROR) for s, r in enumerate((first, second))]
    got = rollout_metrics([chain[2], failed[1], whole, chain[0], failed[0], chain[1]])
    assert got == {
        "reward/mean": 1.25,
        "reward/std": 0.5,
        "reward/max": 1.75,
        "reward/min": 0.75,
        "reward/success": 0.5,
        "reward/frac_zero_std": 0.0,
        "response_length/mean": 10.0,
        "response_length/max": 12.0,
        "response_length/min": 8.0,
        "response_length/clip_ratio": 0.5,
        "prompt_length/mean": 4.0,
        "prompt_length/max": 5.0,
        "prompt_length/min": 3.0,
        "response/distinct_2": 1 / 16,
        "num_turns/mean": 2.0,
        "error/frac": pytest.approx(1 / 3),
        "compaction/segments_mean": 2.0,
        "compaction/segments_max": 3.0,
        "compaction/frac": 0.5,
    }


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_returns_run_along_chains(gamma: float) -> None:
    """Rows 3, 0, 2 of one episode, of which the middle one has no action; row 1 was cut, and nothing goes on."""
    action = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    reward = [[0, 0, 0, 0], [0, 4, 0, 0], [0, 0.5, 0, 2], [0.25, 0, 1, 0]]
    cut, over = Ending.CUT, Ending.TERMINATED
    e = experience_of(action, reward=reward, ending=[cut, cut, over, cut], value=np.zeros((1, 4, 4)))
    e = e._replace(episode_B=np.array([5, 6, 5, 5]), segment_B=np.array([1, 0, 2, 0]))
    host = e._replace(valid_B=np.ones(4, bool), ending_B=np.array([cut, cut, over, cut]))
    got = to_go(np.array(reward, np.float32), np.array(action, bool), gamma, chains=Chains.of(host))
    last = [0.5 + gamma * 2, 2]
    chain = [0.25 + gamma * (1 + gamma * last[0]), 1 + gamma * last[0]]
    np.testing.assert_allclose(got[3, [0, 2]], chain, rtol=1e-6)
    np.testing.assert_allclose(got[2, [1, 3]], last, rtol=1e-6)
    assert got[1, 1] == 4
    out = advantage_metrics(Batch(e, np.zeros((4, 4), np.float32)), gamma)
    assert out["critic/returns/mean"] == pytest.approx(np.mean([*chain, *last, 4]), rel=1e-6)


def test_answers_that_are_alike_have_few_distinct_pairs() -> None:
    """Pairs (5, 6), (6, 5) and, in another turn, (5, 6): 2 of 3; what is across an observation is no pair."""
    token = np.array([1, 5, 6, 5, 9, 5, 6], np.int32)
    action = np.array([0, 1, 1, 1, 0, 1, 1], bool)
    plain = row(1.0, 4, 3, 0, Ending.TERMINATED)
    got = rollout_metrics([replace(plain, token=token, action=action)])
    assert got["response/distinct_2"] == pytest.approx(2 / 3)
    assert "response/distinct_2" not in rollout_metrics([row_of({})])
