"""Scoring: aligned, blind to the future, and the same with a shared prefix."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import ACTOR, CRITIC, params, random_experience
from ppojax.models import forward
from ppojax.models.forward import Params, head_VD, hidden_states, positions
from ppojax.types import Experience, Layout

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
