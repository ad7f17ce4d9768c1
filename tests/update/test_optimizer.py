"""The optimizer: schedules, clipping, the head's own rate, and updates that are refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batch import minibatch

from helpers import ACTOR, CRITIC, params
from ppojax.losses import DPPO
from ppojax.mesh import MeshConfig
from ppojax.types import Batch, Layout, TrainState
from ppojax.update.actor import actor_step
from ppojax.update.critic import critic_step
from ppojax.update.settings import CriticConfig, OptimizerConfig
from ppojax.update.state import apply_gradients, init_state, skipped_in_a_row

MESH = MeshConfig().build()


def rates(steps: range, **settings: Any) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **settings)
    return [float(config.learning_rate_at(jnp.int32(step))) for step in steps]


def test_the_first_warm_up_step_already_moves() -> None:
    assert rates(range(6), warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates(range(3)) == [1.0] * 3


def test_decays_reach_zero() -> None:
    linear = rates(range(8), warmup_steps=2, schedule="linear", decay_steps=4)
    assert linear == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0], abs=1e-6)
    cosine = rates(range(5), schedule="cosine", decay_steps=4)
    assert cosine == pytest.approx([(1 + np.cos(np.pi * t / 4)) / 2 for t in range(5)], abs=1e-6)


def test_one_update_is_adamw_of_the_clipped_gradient() -> None:
    """p - lr (m / (sqrt(v) + eps) + decay p), with g scaled to the norm that it may have at most."""
    config = OptimizerConfig(learning_rate=0.1, eps=0.01, weight_decay=0.5, max_grad_norm=2.0)
    p, g = np.array([1.0, -2.0], np.float32), np.array([3.0, 4.0], np.float32)
    transform = config.build()
    updates, _ = transform.update({"x": jnp.asarray(g)}, transform.init({"x": jnp.asarray(p)}), {"x": jnp.asarray(p)})
    clipped = g * 2 / 5
    want = -0.1 * (clipped / (np.abs(clipped) + 0.01) + 0.5 * p)  # the first step's moments, bias-corrected
    np.testing.assert_allclose(updates["x"], want, rtol=1e-5)


def test_what_no_gradient_reaches_does_not_decay() -> None:
    transform = OptimizerConfig(learning_rate=0.1, weight_decay=0.5).build()
    p = {"layers": {"router": jnp.ones(3), "choice_bias": jnp.arange(3.0)}}
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, p), transform.init(p), p)
    np.testing.assert_array_equal(updates["layers"]["choice_bias"], 0)
    np.testing.assert_allclose(updates["layers"]["router"], -0.05, rtol=1e-6)


def stepped(state: TrainState, batch: Batch, **settings: Any) -> tuple[TrainState, dict[str, float]]:
    state, metrics, _ = actor_step(
        state, batch, model=ACTOR, loss=DPPO(), optimizer=OptimizerConfig(**settings), temperature=1.0, layout=Layout(),
        microbatch_rows=8, mesh=MESH,
    )  # fmt: skip
    return state, {name: float(value) for name, value in metrics.items()}


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count() -> None:
    """After a good step: parameters, moments and the schedule's count stay bit by bit; the next good step goes on."""
    settings: dict[str, Any] = {"learning_rate": 1e-2, "warmup_steps": 3}
    batch, _ = minibatch()
    poisoned = batch._replace(advantage_BT=batch.advantage_BT.at[0].set(jnp.inf))
    state = init_state(ACTOR, params(), OptimizerConfig(**settings).build(), MESH)
    state, metrics = stepped(state, batch, **settings)
    assert metrics["actor/skipped"] == 0 and metrics["actor/lr"] == pytest.approx(2.5e-3)
    before = jax.device_get(state)
    for count in (1, 2):
        state, metrics = stepped(state, poisoned, **settings)
        assert metrics["actor/skipped"] == 1 and not np.isfinite(metrics["actor/grad_norm"])
        assert metrics["actor/lr"] == pytest.approx(5e-3)
        assert skipped_in_a_row(state) == count
    after = jax.device_get(state)
    assert after.skipped.tolist() == [2, 2] and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(skipped=0), before._replace(skipped=0))
    state, metrics = stepped(state, batch, **settings)
    assert metrics["actor/skipped"] == 0 and skipped_in_a_row(state) == 0
    assert state.skipped.tolist() == [2, 0] and int(state.step) == 2
    assert not np.array_equal(state.params["norm"], before.params["norm"])


def test_without_a_single_action_nothing_moves() -> None:
    batch, _ = minibatch()
    e = batch.experience
    nothing = batch._replace(
        experience=e._replace(
            action_BT=jnp.zeros_like(e.action_BT),
            action_index_BA=jnp.zeros_like(e.action_index_BA),
            valid_B=jnp.zeros_like(e.valid_B),
        )
    )
    start = params()
    state, metrics = stepped(init_state(ACTOR, start, OptimizerConfig().build(), MESH), nothing, learning_rate=1.0)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["actor/grad_norm"] == 0 and metrics["actor/loss"] == 0 and metrics["actor/skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, start)


def test_the_reported_norm_is_that_before_clipping() -> None:
    batch, _ = minibatch()
    loud, quiet = ({"learning_rate": 1.0, "eps": 1e6, "max_grad_norm": norm} for norm in (1e6, 1e-3))
    moved = []
    for settings in (loud, quiet):
        start = params()
        state, metrics = stepped(init_state(ACTOR, start, OptimizerConfig(**settings).build(), MESH), batch, **settings)
        # With a huge eps an update is lr g / eps: its norm says how long the gradient was that Adam got.
        moved.append(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), state.params, start))
        norm = metrics["actor/grad_norm"]
    assert norm > 1e-3
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved[1])) < max(
        np.abs(x).max() for x in jax.tree.leaves(moved[0])
    )


def test_the_head_has_its_own_learning_rate() -> None:
    batch, _ = minibatch()
    moved = []
    for multiplier in (1.0, 10.0):
        config = CriticConfig(optimizer=OptimizerConfig(learning_rate=1e-2), head_lr_multiplier=multiplier)
        start = params(CRITIC)
        state = init_state(CRITIC, start, config.build_optimizer(), MESH)
        state, _ = critic_step(state, batch, model=CRITIC, config=config, layout=Layout(), microbatch_rows=8, mesh=MESH)
        moved.append((state.params, start))
    (one, start), (ten, _) = moved
    jax.tree.map(np.testing.assert_array_equal, one["trunk"], ten["trunk"])
    head = [np.asarray(p["value_head"]) - np.asarray(start["value_head"]) for p in (one, ten)]
    # Differences of parameters near 1 are known to 2^-24.
    np.testing.assert_allclose(head[1], 10 * head[0], rtol=1e-4, atol=1e-6)


def test_masters_are_float32_whatever_they_were() -> None:
    half = jax.jit(lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p))(params())
    optimizer = OptimizerConfig().build()
    state = init_state(ACTOR, half, optimizer, MESH)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 3 * len(jax.tree.leaves(half)) and {str(x.dtype) for x in floats} == {"float32"}
    grads = jax.tree.map(jnp.ones_like, state.params)
    new, metrics = apply_gradients(state, grads, jnp.float32(1), optimizer)
    assert int(new.step) == 1 and float(metrics["skipped"].sum) == 0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_minibatch_without_weight_moves_nothing() -> None:
    """Neither stale momentum nor weight decay acts, and it is not a skipped update."""
    optimizer = OptimizerConfig(learning_rate=0.1, weight_decay=0.1).build()
    state = init_state(ACTOR, params(), optimizer, MESH)
    grads = jax.tree.map(jnp.ones_like, state.params)
    moving, _ = apply_gradients(state, grads, jnp.float32(1), optimizer)
    zero = jax.tree.map(jnp.zeros_like, grads)
    still, metrics = apply_gradients(moving, zero, jnp.float32(0), optimizer)
    jax.tree.map(np.testing.assert_array_equal, still, moving)
    assert float(metrics["skipped"].sum) == 0  # pyright: ignore[reportAttributeAccessIssue]
