"""Turns that the trainer's own pass scores and draws again: what is proposed to it no longer matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
import pytest

from ppojax.experience.pack import pack
from ppojax.experience.score import Scorers, score
from ppojax.rollout.decode import no_turns
from ppojax.rollout.exact import Judge, resume
from ppojax.types import Layout, Records, Rollout, Row
from tiny_model import MODEL, TOKENIZER, collector_of, random_policy, scripted_task, stops

TASKS = [scripted_task(p, ("e2", 0.0), ("h", 0.5), ("done", 1.0)) for p in ("a?", "bc?", "d")]
KEY = jax.random.key(5)
JUDGE = Judge(MODEL, rows=4, width=64, actions=18, turn_tokens=6)


def play(**changes: object) -> Rollout:
    return replace(collector_of(slots=4, **changes), judge=JUDGE)(random_policy(1), TASKS, KEY)


def scored(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities as the sampler recorded them and as the trainer scores them, of every action."""
    mesh = collector_of().sampler.mesh
    e = pack(rows, batch=8, bucket=64, actions=18, mesh=mesh)
    e = score(
        Scorers(old=random_policy(1)), e, actor=MODEL, critic=None, layout=Layout(), temperature=1.0, microbatch_rows=4
    )
    action_BT = np.asarray(e.action_BT)
    return np.asarray(e.logp_behavior_BT)[action_BT], np.asarray(e.logp_old_BT)[action_BT]


@pytest.mark.slow
def test_what_is_recorded_is_the_trainer_s_score_to_the_bit() -> None:
    """Three turns, some of which end early; without a judge the same tokens, and log-probabilities next to these."""
    got = play(records=Records(3, hidden=True))
    assert got.metrics["sampling/redrawn_frac"] == 0
    recorded_N, scored_N = scored(got.rows)
    np.testing.assert_array_equal(recorded_N, scored_N)
    plain = collector_of(slots=4)(random_policy(1), TASKS, KEY).rows
    assert [row.token.tolist() for row in plain] == [row.token.tolist() for row in got.rows]
    recorded_N, scored_N = scored(plain)
    # The bound of the plain sampler in float32; that it is not always 0 is why there is a judge.
    assert 0 < np.abs(recorded_N - scored_N).max() < 1e-5
    head_VD = np.asarray(random_policy(1)["head"], np.float64)
    for row in got.rows:
        z_NV = row.recorded.hidden @ head_VD.T
        logp_NV = z_NV - np.log(np.exp(z_NV).sum(1, keepdims=True))
        drawn_N1 = row.token[row.action][:, None]
        for id_NK, logp_NK in ((drawn_N1, row.logp_behavior[row.action][:, None]), row.recorded[:2]):
            np.testing.assert_allclose(logp_NK, np.take_along_axis(logp_NV, id_NK, 1), rtol=0, atol=2e-6)
        np.testing.assert_allclose(row.recorded.top_logp[:, 0], logp_NV.max(1), rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("gap", [{"int8_cache": True}, {"logit_noise": 1.0}])
def test_what_is_proposed_does_not_matter(gap: dict) -> None:
    """A sampler that is off by much, with noise by a fifth of its draws, gives the very same rows, bit by bit."""
    want, got = play(), play(**gap)
    for a, b in zip(want.rows, got.rows, strict=True):
        assert a.token.tolist() == b.token.tolist() and a.action.tolist() == b.action.tolist()
        np.testing.assert_array_equal(a.logp_behavior, b.logp_behavior)
        assert (a.ending, a.clipped, a.reward.tolist()) == (b.ending, b.clipped, b.reward.tolist())
    if "logit_noise" in gap:
        assert got.metrics["sampling/redrawn_frac"] > 0.1


def test_a_turn_goes_on_where_its_tokens_leave_it() -> None:
    """Of six tokens, two left, the last three are taken away: the turn is live, unless what is left stops it."""
    stop_SV = np.asarray(stops(stop=("ab",)))
    a, b = (TOKENIZER.encode(letter)[0] for letter in "ab")

    def after(token: list[int], left: int = 2, room: int = 9) -> tuple[bool, int, int]:
        turns = no_turns(2)
        turns.left_B[1] = left
        resume(turns, 1, token, 3, room, stop_SV)
        assert not turns.live_B[0]
        return bool(turns.live_B[1]), int(turns.left_B[1]), int(turns.state_B[1])

    stopped = len(stop_SV) - 1
    live, left, state = after([b, b, a])
    assert live and left == 5 and stop_SV[state, b] == stopped
    assert after([b, a, b]) == (False, 5, stopped) and after([a, a, TOKENIZER.eos_ids[0]]) == (False, 5, stopped)
    assert not after([b, b, a], left=-3)[0] and not after([b, b, a], room=0)[0]
