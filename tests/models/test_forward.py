"""Scoring: aligned, blind to the future, and the same with a shared prefix."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import ACTOR, CRITIC, SPEC, params, random_experience
from ppojax.models import forward
from ppojax.models.forward import Heads, Params, action_states, head_VD, hidden_states, positions
from ppojax.types import Experience, Layout, Recorded

# Eager scans and checkpoints are several times slower than compiling these once a shape.
score_tokens = jax.jit(forward.score_tokens, static_argnames=("model", "layout", "temperature", "entropy"))
values = jax.jit(forward.values, static_argnames=("model", "layout"))


@partial(jax.jit, static_argnames=("temperature",))
def direct_logp(p: Params, experience: Experience, temperature: float) -> jax.Array:
    """The definition, over the whole [B, T, V]."""
    token_BT = experience.token_BT
    hidden_BTD, *_ = hidden_states(ACTOR, p, token_BT, positions(token_BT))
    logp_BTV = jax.nn.log_softmax(hidden_BTD @ head_VD(p).T / temperature, axis=-1)
    picked = jnp.take_along_axis(logp_BTV[:, :-1], token_BT[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(experience.action_BT, jnp.pad(picked, ((0, 0), (1, 0))), 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("share", [False, True])
def test_logp_is_that_of_the_token_it_stands_at(temperature: float, share: bool) -> None:
    experience, layout = random_experience(share=share)
    assert (layout.group == 2) == share
    p = params()
    got = score_tokens(ACTOR, p, experience, layout, temperature=temperature, entropy=True)
    np.testing.assert_allclose(got.logp, direct_logp(p, experience, temperature), rtol=2e-5, atol=2e-5)
    assert np.all(np.asarray(got.entropy)[~np.asarray(experience.action_BT)] == 0)
    assert np.all(np.asarray(got.entropy)[np.asarray(experience.action_BT)] > 0)


def test_comparisons_with_two_policies() -> None:
    """With the sampler's and the reference's whole distributions, against the definition; only the second's KL and
    the policy's own statistics have a gradient."""
    model = replace(ACTOR, spec=SPEC.model_copy(update={"logit_softcap": 4.0, "tied": False}))
    experience, layout = random_experience(share=True)
    p, sampler, ref = (params(model, seed) for seed in range(3))
    ids = jax.random.randint(jax.random.key(9), (*experience.action_index_BA.shape, 3), 0, 48)

    @jax.jit
    def both(p: Params) -> tuple:
        hidden = [action_states(model, q, experience, Layout())[0] for q in (p, sampler, ref)]
        e = experience._replace(recorded=Recorded(ids, None, hidden[1]), hidden_ref_BAD=hidden[2])
        heads = Heads(head_VD(sampler), head_VD(ref))
        got = forward.score_and_route(model, p, e, layout, temperature=0.8, heads=heads)[0]
        logp = [
            jax.nn.log_softmax(4.0 * jnp.tanh(h @ head_VD(q).T / 4.0) / 0.8, axis=-1)
            for h, q in zip(hidden, (p, sampler, ref), strict=True)
        ]
        return got, logp

    got, (logp, mu, other) = both(p)
    real = np.asarray(experience.action_index_BA) > 0
    at = (np.arange(8)[:, None], np.asarray(experience.action_index_BA))
    want = {
        "tv": 0.5 * jnp.abs(jnp.exp(logp) - jnp.exp(mu)).sum(-1),
        "reverse_kl": (jnp.exp(mu) * (mu - logp)).sum(-1),
        "kl_ref": (jnp.exp(logp) * (logp - other)).sum(-1),
    }
    for name, value in want.items():
        found = np.asarray(getattr(got, name))
        np.testing.assert_allclose(found[at][real], value[real], rtol=1e-4, atol=2e-6, err_msg=name)
        assert not found[~np.asarray(experience.action_BT)].any()
    named = jnp.take_along_axis(logp, ids, axis=-1)
    np.testing.assert_allclose(got.topk_logp[real], named[real], rtol=1e-5, atol=2e-5)
    held = jax.grad(lambda p: sum(jnp.sum(x) for x in (both(p)[0].tv, both(p)[0].reverse_kl)))(p)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(held))
    free = jax.grad(lambda p: jnp.sum(both(p)[0].kl_ref))(p)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(free))


def test_value_does_not_see_its_token() -> None:
    experience, _ = random_experience()
    p, t = params(CRITIC), 9
    changed = experience._replace(token_BT=experience.token_BT.at[:, t].add(1) % 48)
    before, after = values(CRITIC, p, experience), values(CRITIC, p, changed)
    np.testing.assert_array_equal(before[:, :, : t + 1], after[:, :, : t + 1])
    assert np.abs(before[:, :, t + 1] - after[:, :, t + 1]).max() > 1e-3


def test_padding_changes_nothing() -> None:
    experience, _ = random_experience()
    p = params()
    real = np.arange(experience.token_BT.shape[1])[None] < np.asarray(experience.length_B)[:, None]
    noisy = experience._replace(token_BT=jnp.where(real, experience.token_BT, 7))
    a, b = (score_tokens(ACTOR, p, e, temperature=1.0).logp for e in (experience, noisy))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["actor", "critic"])
def test_shared_prefix_gives_the_values_and_gradients_of_separate_rows(kind: str) -> None:
    experience, layout = random_experience(prompts=3, group=4, share=True)
    assert layout.group == 4 and layout.prefix > 0
    weight = jax.random.normal(jax.random.key(3), experience.reward_BT.shape)
    model = ACTOR if kind == "actor" else CRITIC

    @partial(jax.jit, static_argnames=("how",))
    @partial(jax.value_and_grad, has_aux=True)
    def scalar(p: Params, how: Layout) -> tuple[jax.Array, jax.Array]:
        if kind == "actor":
            out = score_tokens(model, p, experience, how, temperature=1.0).logp
        else:
            out = jnp.where(experience.action_BT, values(model, p, experience, how)[0], 0.0)
        return jnp.sum(out * weight), out

    (_, shared), shared_grad = scalar(params(model), how=layout)
    (_, plain), plain_grad = scalar(params(model), how=Layout())
    np.testing.assert_allclose(shared, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(shared_grad), jax.tree.leaves(plain_grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_bootstrap_value_has_a_place() -> None:
    """The value after a row's last token is that of the state in which the next one would be chosen."""
    experience, layout = random_experience(share=True)
    p = params(CRITIC)
    shared, plain = values(CRITIC, p, experience, layout), values(CRITIC, p, experience)
    rows, end = np.arange(8), np.asarray(experience.length_B)
    np.testing.assert_allclose(shared[0, rows, end], plain[0, rows, end], rtol=1e-5, atol=1e-5)
    assert np.abs(plain[0, rows, end]).min() > 0
