"""Steps of models with adapters: only those move, on every mesh alike, and critics share one frozen trunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batch import minibatch

from helpers import ACTOR, CRITIC
from ppojax.losses import DPPO
from ppojax.mesh import MeshConfig
from ppojax.models.forward import init, join
from ppojax.models.lora import LoRAConfig, combine, split
from ppojax.types import TrainState
from ppojax.update.actor import actor_step
from ppojax.update.critic import critic_step
from ppojax.update.settings import CriticConfig, OptimizerConfig
from ppojax.update.state import init_state, place_frozen

# Smooth in the gradient, as in the invariance tests.
OPTIMIZER = OptimizerConfig(learning_rate=1.0, eps=1.0, max_grad_norm=1e6)
LORA = LoRAConfig(rank=2, alpha=4)


def moved(model: Any, seed: int = 0) -> tuple[Any, Any]:
    """Adapters that do something (with b = 0 no a has a gradient), and the base."""
    trained, frozen = split(init(model, jax.random.key(seed)), LORA)
    leaves, tree = jax.tree.flatten(trained)
    noise = [0.3 * jax.random.normal(jax.random.key(i + 100 * seed), x.shape) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, noise), frozen


def assert_close(got: Any, want: Any) -> None:
    """Float32 sums of some hundred terms in another order, to 2e-5 of the largest."""
    largest = max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-5 * largest)


def actor_moves(
    mesh: MeshConfig,
    share: bool,
    microbatch_rows: int,
    dtype: str = "float32",
    lora: LoRAConfig = LORA,
    key: jax.Array | None = None,
) -> tuple[TrainState, Any]:
    model, built = replace(ACTOR, lora=lora), mesh.build()
    start, frozen = moved(model)
    if dtype == "rounded":  # to bfloat16, but kept in float32
        frozen, dtype = jax.tree.map(lambda p: p.astype("bfloat16"), frozen), "float32"
    frozen = place_frozen(model, jax.tree.map(lambda p: p.astype(dtype), frozen), built)
    before = jax.device_get(frozen)
    state = init_state(model, start, OPTIMIZER.build(), built)
    batch, layout = minibatch(mesh, share)
    state, metrics, _ = actor_step(
        state, batch, model=model, loss=DPPO(), optimizer=OPTIMIZER, temperature=1.0, layout=layout,
        microbatch_rows=microbatch_rows, mesh=built, frozen=frozen, key=key,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {dtype}
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)} == {"a", "b"}
    # Adam's two moments and its two counts, and the schedule's.
    leaves = len(jax.tree.leaves(start))
    assert leaves == 14 and len(jax.tree.leaves(state.opt_state)) <= 2 * leaves + 2
    assert not any(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state.params, start)), strict=True))
    return state, {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
def test_meshes_and_microbatches_change_nothing() -> None:
    want, want_metrics = actor_moves(MeshConfig(), False, 8)
    got, metrics = actor_moves(MeshConfig(fsdp=2, tensor=2), True, 4)
    assert_close(got.params, want.params)
    assert metrics == pytest.approx(want_metrics, rel=2e-5, abs=1e-6)
    assert got.params["layers"]["lora"]["q"]["a"].sharding.shard_shape((2, 32, 2)) == (2, 16, 2)


@pytest.mark.slow
def test_what_is_dropped_follows_the_key_and_not_microbatch_or_mesh() -> None:
    half, key = LORA.model_copy(update={"dropout": 0.5}), jax.random.key(7)
    want, _ = actor_moves(MeshConfig(), True, 8, lora=half, key=key)
    for mesh, rows in ((MeshConfig(), 2), (MeshConfig(fsdp=2, tensor=2), 4)):
        assert_close(actor_moves(mesh, True, rows, lora=half, key=key)[0].params, want.params)
    other, _ = actor_moves(MeshConfig(), True, 8, lora=half, key=jax.random.key(8))
    off, _ = actor_moves(MeshConfig(), True, 8, lora=half)
    plain, _ = actor_moves(MeshConfig(), True, 8)
    jax.tree.map(np.testing.assert_array_equal, off.params, plain.params)
    for state in (other, plain):
        assert not np.allclose(state.params["layers"]["lora"]["q"]["b"], want.params["layers"]["lora"]["q"]["b"])


@pytest.mark.slow
def test_critics_drop_each_their_own() -> None:
    """Two critics with the same adapters and the same rows part where they drop, and only there."""
    batch, layout = minibatch(share=True)
    e = batch.experience
    assert e.value_MBT is not None and batch.return_MBT is not None
    batch = batch._replace(
        experience=e._replace(value_MBT=jnp.concatenate([e.value_MBT] * 2)),
        return_MBT=jnp.concatenate([batch.return_MBT] * 2),
    )
    both = replace(CRITIC, lora=LORA.model_copy(update={"dropout": 0.5}), count=2)
    start, frozen = moved(both.member)
    start = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    config, built = CriticConfig(optimizer=OPTIMIZER, count=2), MeshConfig().build()
    moves = []
    for key, rows in ((None, 8), (jax.random.key(1), 8), (jax.random.key(1), 4)):
        state, _ = critic_step(
            init_state(both, start, config.build_optimizer(), built), batch, model=both, config=config, layout=layout,
            microbatch_rows=rows, mesh=built, frozen=place_frozen(both, frozen, built), key=key,
        )  # fmt: skip
        moves.append(state.params)
    a = [move["trunk"]["layers"]["lora"]["q"]["a"] for move in moves]
    np.testing.assert_array_equal(a[0][0], a[0][1])
    assert not np.allclose(a[1][0], a[1][1]) and not np.allclose(a[1][0], a[0][0])
    assert_close(moves[2], moves[1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=4), MeshConfig(fsdp=4), MeshConfig(tensor=4)], ids=str)
def test_other_meshes_change_nothing(mesh: MeshConfig) -> None:
    assert_close(actor_moves(mesh, False, 8)[0].params, actor_moves(MeshConfig(), False, 8)[0].params)


@pytest.mark.slow
def test_a_base_in_half_precision_is_the_same_numbers_in_float32() -> None:
    half, rounded = (actor_moves(MeshConfig(), False, 8, dtype)[0] for dtype in ("bfloat16", "rounded"))
    assert_close(half.params, rounded.params)


@pytest.mark.slow
def test_critics_with_adapters_share_their_trunk_and_step_alone() -> None:
    built = MeshConfig().build()
    batch, layout = minibatch()
    e = batch.experience
    assert e.value_MBT is not None and batch.return_MBT is not None
    batch = batch._replace(
        experience=e._replace(value_MBT=jnp.concatenate([e.value_MBT] * 2)),
        return_MBT=jnp.concatenate([batch.return_MBT, -batch.return_MBT]),
    )
    config = CriticConfig(optimizer=OPTIMIZER, count=2, split="prompts")
    both = replace(CRITIC, lora=LORA, count=2)
    frozen = moved(both.member)[1]
    starts = [moved(both.member, seed)[0] for seed in (1, 2)]
    whole = join([combine(frozen, start) for start in starts], LORA)
    assert whole["trunk"]["embed"].ndim == 2 and whole["value_head"].ndim == 3
    assert split(init(both, jax.random.key(0)), LORA)[1]["trunk"]["embed"].ndim == 2

    def run(model: Any, start: Any, batch: Any) -> TrainState:
        state = init_state(model, start, config.build_optimizer(), built)
        return critic_step(
            state, batch, model=model, config=config, layout=layout, microbatch_rows=8, mesh=built,
            frozen=place_frozen(model, frozen, built),
        )[0]  # fmt: skip

    together = run(both, split(whole, LORA)[0], batch)
    assert set(together.params) == {"trunk", "value_head"} and set(together.params["trunk"]["layers"]) == {"lora"}
    for m, start in enumerate(starts):
        mine = e.action_BT & (e.group_B % 2 == m)[:, None]
        part = batch._replace(
            experience=batch.experience._replace(action_BT=mine, value_MBT=e.value_MBT),
            return_MBT=batch.return_MBT[m : m + 1],
        )
        alone = run(both.member, start, part)
        assert_close(jax.tree.map(lambda x, m=m: x[m], together.params), alone.params)
        assert not np.array_equal(alone.params["value_head"], start["value_head"])
