"""Losses that are scaled so that float16 holds their gradients."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batch import minibatch

from helpers import ACTOR, params
from ppojax.losses import Reinforce
from ppojax.mesh import MeshConfig
from ppojax.types import Batch, LossOut, TrainState
from ppojax.update.accumulate import gradients
from ppojax.update.actor import actor_step
from ppojax.update.settings import OptimizerConfig
from ppojax.update.state import apply_gradients, init_state, loss_scale
from small_batch import token_row

OPTIMIZER = OptimizerConfig(learning_rate=0.1, eps=1.0, max_grad_norm=1e6)


def state_of(step: int, refused: int) -> TrainState:
    return TrainState({}, (), jnp.int32(step), jnp.asarray([refused, 0], jnp.int32))


@pytest.mark.parametrize(
    ("step", "refused", "want"),
    [(0, 0, 2**10), (0, 3, 2**7), (999, 0, 2**10), (2000, 1, 2**11), (0, 99, 1), (10**6, 0, 2**24)],
)
def test_the_scale_follows_what_was_refused_and_applied(step: int, refused: int, want: int) -> None:
    scale = loss_scale(state_of(step, refused), "float16")
    assert scale is not None and float(scale) == want
    assert loss_scale(state_of(step, refused), "bfloat16") is None


@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_and_loss_are_of_the_loss_itself(rows: int) -> None:
    """Of x = 2^-16 and 2^-27, which go back through float16: there 2^-25 and less is 0, but times 2^10 it is not."""
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), token_row([1.0, 1.0]))
    x = jnp.asarray([2.0**-16, 2.0**-27])

    def loss(p: dict[str, jax.Array], part: Batch) -> LossOut:
        n = part.advantage_BT.shape[0]
        return LossOut(n * jnp.sum(p["w"].astype("float16").astype("float32") * x), jnp.float32(2 * n), {})

    for scale, want in ((None, [2.0**-16, 0]), (jnp.float32(2**10), [2.0**-16, 2.0**-27])):
        grads, value, weight, _, _ = gradients(loss, {"w": jnp.ones(2)}, batch, rows, scale=scale)
        np.testing.assert_array_equal(grads["w"], np.asarray(want, np.float32) / 2)
        np.testing.assert_allclose(value, float(x.sum()) / 2, rtol=1e-6)
        assert weight == 4


def test_an_overflow_is_refused_and_halves_the_scale() -> None:
    """At 2^10 a gradient of 100 is beyond float16's 65504, as at 2^9 and 51,200 it is not any more."""
    optimizer = OptimizerConfig(learning_rate=0.1, max_grad_norm=1e6).build()
    start = {"w": jnp.ones(1)}
    state = TrainState(start, optimizer.init(start), jnp.int32(0), jnp.zeros(2, jnp.int32))
    seen = []
    for _ in range(3):
        scale = loss_scale(state, "float16")
        assert scale is not None
        back = jax.grad(lambda p, s=scale: jnp.sum(p["w"].astype("float16").astype("float32")) * 100 * s)(state.params)
        state, told = apply_gradients(state, jax.tree.map(lambda g, s=scale: g / s, back), jnp.float32(1), optimizer)
        seen.append((float(scale), float(told["skipped"].sum), int(state.step)))
    assert seen == [(1024, 1, 0), (512, 0, 1), (512, 0, 2)]


@pytest.mark.slow
def test_a_step_in_float16_is_nearly_that_in_float32() -> None:
    """Moves are within 1% of the largest, where in bfloat16 they are up to 8 times as far off; the scale is logged."""
    batch, layout = minibatch()
    mesh = MeshConfig().build()

    def moved(dtype: str) -> tuple[np.ndarray, dict[str, jax.Array]]:
        model, start = replace(ACTOR, mesh=mesh, dtype=dtype), params(ACTOR)
        state, metrics, _ = actor_step(
            init_state(model, start, OPTIMIZER.build(), mesh), batch, model=model, loss=Reinforce(),
            optimizer=OPTIMIZER, temperature=1.0, layout=layout, microbatch_rows=4, mesh=mesh,
        )  # fmt: skip
        pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(start), strict=True)
        return np.concatenate([(np.asarray(a) - np.asarray(b)).ravel() for a, b in pairs]), metrics

    (exact, _), (half, told), (brain, _) = (moved(dtype) for dtype in ("float32", "float16", "bfloat16"))
    largest = np.abs(exact).max()
    assert largest > 1e-4 and np.abs(half - exact).max() < 0.01 * largest
    assert np.abs(half - exact).mean() < 0.3 * np.abs(brain - exact).mean()
    assert float(told["actor/loss_scale"]) == 1024 and float(told["actor/skipped"]) == 0
