"""Gaps put in on purpose: of the stated size, the same wherever a row lies, and nothing of them by default."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.rollout.collect import Collector
from ppojax.rollout.draw import sample
from ppojax.rollout.mismatch import INT8_MAX, int8_rounded, noisy, noisy_hidden
from ppojax.trainer.build import greedy, plain
from ppojax.types import Row
from tiny_model import MODEL, collector_of, random_policy, scripted_task

TASKS = [scripted_task(p, ("e2", 0.0), ("done", 1.0)) for p in ("a?", "bc?", "d")]
KEY = jax.random.key(5)


def play(collector: Collector, tasks: Sequence = TASKS) -> Sequence[Row]:
    return collector(random_policy(1), tasks, KEY).rows


def test_noise_is_of_the_episode_and_the_position() -> None:
    key_B = jax.vmap(lambda e: jax.random.fold_in(KEY, e))(jnp.arange(4))
    logits_BV, position_B = jnp.zeros((4, 600)), jnp.array([3, 9, 3, 3])
    noise_BV = np.asarray(noisy(logits_BV, key_B, position_B, 0.5))
    # 2400 draws: mean and deviation within 4 standard errors.
    assert abs(noise_BV.mean()) < 4 * 0.5 / 2400**0.5 and abs(noise_BV.std() - 0.5) < 4 * 0.5 / 4800**0.5
    moved = noisy(logits_BV[:2], key_B[::-1][:2], position_B[::-1][:2], 0.5)
    np.testing.assert_array_equal(moved, noise_BV[::-1][:2])
    assert len(np.unique(noise_BV)) > 2390  # other rows and places have other noise
    # The draw at a position is of another key.
    assert not np.any(noise_BV == np.asarray(jax.random.normal(jax.random.fold_in(key_B[0], 3), (600,))) * 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_on_hidden_states_is_a_share_of_each(dtype: str) -> None:
    hidden_BD = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2000)) * [[1e-2], [1.0], [30.0]], dtype)
    got = noisy_hidden(hidden_BD, jax.random.split(KEY, 3), jnp.arange(3), 0.3)
    assert got.dtype == dtype
    clean_BD, noise_BD = (np.asarray(x.astype(jnp.float32)) for x in (hidden_BD, got - hidden_BD))
    share_B = noise_BD.std(1) / np.sqrt(np.square(clean_BD).mean(1))
    np.testing.assert_allclose(share_B, 0.3, rtol=4 / 4000**0.5)  # 4 standard errors


def test_the_gap_grows_with_the_noise() -> None:
    """As sigma for small ones: |log pi_noisy - log pi| is that of sigma (n_v - sum_w pi_w n_w), to first order."""
    logits_BV = jnp.asarray(np.random.default_rng(1).normal(size=(4000, 20)) * 2, jnp.float32)
    key_B = jax.random.split(KEY, 4000)
    position_B, uniform_B = jnp.zeros(4000, jnp.int32), jax.random.uniform(jax.random.key(2), (4000,))

    @jax.jit
    def gap(deviation: jax.Array) -> jax.Array:
        token_B, logp_B = sample(noisy(logits_BV, key_B, position_B, deviation), uniform_B)
        clean_BV = jax.nn.log_softmax(logits_BV)
        return jnp.mean(jnp.abs(logp_B - jnp.take_along_axis(clean_BV, token_B[:, None], axis=1)[:, 0]))

    one, two, four = (float(gap(jnp.float32(d))) for d in (0.05, 0.1, 0.2))
    # The mean |n| of a standard normal is .8, of which the token's own share of the mean takes some.
    assert 0.4 * 0.05 < one < 0.8 * 0.05 and two / one == pytest.approx(2, rel=0.06) == four / two


@pytest.mark.slow
def test_noisy_rows_do_not_depend_on_slots() -> None:
    """In fewer slots, and so in another order and company: the same tokens, and logps up to rounding."""
    whole, few = play(collector_of(logit_noise=1.0)), play(collector_of(slots=2, logit_noise=1.0))
    for a, b in zip(whole, few, strict=True):
        assert a.token.tolist() == b.token.tolist()
        np.testing.assert_allclose(a.logp_behavior, b.logp_behavior, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_rounding_error(dtype: str) -> None:
    """Half a step at most, of a step that each head and position has by itself."""
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 2, 16)) * np.logspace(-3, 3, 5)[None, None, :, None, None]
    x[0, 0, 0] = 0
    given = jnp.asarray(x, dtype)
    got = jax.jit(int8_rounded)(given)
    assert got.dtype == dtype
    x, rounded = np.asarray(given.astype(jnp.float32), np.float64), np.asarray(got.astype(jnp.float32), np.float64)
    step = np.abs(x).max(-1, keepdims=True) / INT8_MAX
    # Float32 rounding of the quotient and the product; in bfloat16 the result is rounded once more.
    slack = step * (1e-4 if dtype == "float32" else INT8_MAX * 2**-8)
    assert np.all(np.abs(rounded - x) <= step / 2 + slack) and not rounded[0, 0, 0].any()
    if dtype == "float32":
        assert np.abs(rounded - x).max() > 0.4 * step.max()
        levels = rounded / np.where(step > 0, step, 1)
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)


@pytest.mark.slow
def test_an_int8_cache_shifts_what_is_read_from_it() -> None:
    """A small gap from the plain sampler, in the tokens that are read after the prompt; the first draw has none."""
    whole, rounded = play(collector_of(group_size=1)), play(collector_of(group_size=1, int8_cache=True))
    gaps = []
    for a, b in zip(whole, rounded, strict=True):
        first = int(a.action.argmax())
        same = next((n for n, (x, y) in enumerate(zip(a.token, b.token, strict=False)) if x != y), len(a.token))
        assert same > first  # the prompt is read at once, and its tokens see each other unrounded
        np.testing.assert_allclose(a.logp_behavior[first], b.logp_behavior[first], rtol=0, atol=1e-6)
        gaps.append(np.abs(a.logp_behavior[:same] - b.logp_behavior[:same]).max())
    assert 1e-4 < max(gaps) < 0.2


def test_evaluation_has_no_injected_gap() -> None:
    collector = collector_of(logit_noise=1.0, hidden_noise=1.0, int8_cache=True)
    for clean in (plain(collector), greedy(collector)):
        assert clean.sampler.logit_noise == clean.sampler.hidden_noise == 0 and not clean.sampler.int8_cache
    assert plain(collector).sampler == collector_of().sampler and collector.sampler.model == MODEL
