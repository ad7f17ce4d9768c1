"""Scoring by microbatches: each row gets its own numbers, whatever rows go through with it."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from helpers import ACTOR, CRITIC, params, random_experience
from ppojax.experience.score import Scorers, score
from ppojax.models.forward import action_states, score_tokens, values
from ppojax.types import Layout


@pytest.mark.parametrize(("rows", "share"), [(8, False), (2, False), (4, True)])
def test_rows_come_back_in_their_places(rows: int, share: bool) -> None:
    experience, layout = random_experience(share=share)
    scorers = Scorers(params(ACTOR), params(ACTOR, seed=5), params(CRITIC))
    run = partial(score, actor=ACTOR, critic=CRITIC, layout=layout, temperature=0.8, microbatch_rows=rows)
    got = run(scorers, experience)
    logp = jax.jit(lambda p: score_tokens(ACTOR, p, experience, temperature=0.8).logp)
    want_value = jax.jit(lambda p: values(CRITIC, p, experience))(scorers.critic)
    # The same float32 sums in another order.
    np.testing.assert_allclose(got.logp_old_BT, logp(scorers.old), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.logp_ref_BT, logp(scorers.reference), rtol=1e-5, atol=1e-5)
    inside = np.asarray(experience.prefix_B)[:, None] <= np.arange(experience.token_BT.shape[1])
    inside &= np.arange(experience.token_BT.shape[1]) <= np.asarray(experience.length_B)[:, None]
    np.testing.assert_allclose(
        np.where(inside, got.value_MBT[0], 0), np.where(inside, want_value[0], 0), rtol=1e-5, atol=1e-5
    )


def test_what_nobody_asks_for_is_not_computed() -> None:
    experience, _ = random_experience()
    run = partial(score, actor=ACTOR, critic=None, layout=Layout(), temperature=1.0, microbatch_rows=8)
    assert run(Scorers(), experience).logp_old_BT is None
    got = run(Scorers(old=params(ACTOR)), experience)
    assert got.logp_old_BT is not None and got.logp_ref_BT is None and got.value_MBT is None


def test_the_reference_policy_s_hidden_states_are_kept() -> None:
    experience, layout = random_experience(share=True)
    run = partial(score, actor=ACTOR, critic=None, layout=layout, temperature=1.0, microbatch_rows=4)
    got = run(Scorers(reference=params(ACTOR)), experience, hidden_ref=True)
    assert got.logp_ref_BT is None and got.hidden_ref_BAD is not None
    want_BAD, _ = jax.jit(lambda p: action_states(ACTOR, p, experience, Layout()))(params(ACTOR))
    real = np.asarray(experience.action_index_BA) > 0
    np.testing.assert_allclose(got.hidden_ref_BAD[real], want_BAD[real], rtol=1e-5, atol=1e-5)
