"""Critics of an ensemble are lone critics: gradients, clipping, refusals, their own rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batch import minibatch

from helpers import CRITIC, params
from ppojax.experience.summary import advantage_metrics
from ppojax.losses import ValueLoss
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef, join
from ppojax.models.spec import DecoderSpec, MoESpec
from ppojax.models.value_head import ArctanHead, HLGaussHead, LinearHead, ValueHead
from ppojax.types import Batch, Layout, TrainState
from ppojax.update.critic import critic_step
from ppojax.update.settings import CriticConfig, OptimizerConfig
from ppojax.update.state import init_state, skipped_in_a_row

# The clip acts: a member's gradient may not be scaled by the norm of the others'.
OPTIMIZER = OptimizerConfig(learning_rate=1.0, eps=1.0, max_grad_norm=0.01)
COUNT = 3


def config_of(head: ValueHead, **changes: Any) -> CriticConfig:
    loss = ValueLoss() if isinstance(head, HLGaussHead) else ValueLoss(clip=0.3)
    return CriticConfig(optimizer=OPTIMIZER, head=head, loss=loss, **changes)


def for_members(batch: Batch, count: int = COUNT) -> Batch:
    """The same rows, with values and targets that differ from critic to critic."""
    rng = np.random.default_rng(3)
    shift = jnp.asarray(rng.normal(0, 0.3, (count, 1, 1)), jnp.float32)
    e = batch.experience
    assert e.value_MBT is not None and batch.return_MBT is not None
    return batch._replace(experience=e._replace(value_MBT=e.value_MBT - shift), return_MBT=batch.return_MBT + shift)


def member(batch: Batch, m: int, owned: np.ndarray | None = None) -> Batch:
    """What critic m learns from, for a critic alone."""
    e = batch.experience
    assert e.value_MBT is not None and batch.return_MBT is not None
    action = e.action_BT if owned is None else e.action_BT & jnp.asarray(owned)[:, None]
    alone = e._replace(value_MBT=e.value_MBT[m : m + 1], action_BT=action)
    return batch._replace(experience=alone, return_MBT=batch.return_MBT[m : m + 1])


def step(
    model: ModelDef, start: Any, batch: Batch, config: CriticConfig, layout: Layout, mesh: MeshConfig | None = None,
    microbatch_rows: int = 4,
) -> tuple[TrainState, dict[str, float]]:  # fmt: skip
    built = (mesh or MeshConfig()).build()
    state = init_state(model, start, config.build_optimizer(), built)
    state, metrics = critic_step(
        state, batch, model=model, config=config, layout=layout, microbatch_rows=microbatch_rows, mesh=built
    )
    return state, {name: float(value) for name, value in metrics.items()}


def assert_close(got: Any, want: Any) -> None:
    """Updates of order .01, sums of some hundred float32 terms in another order."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


OWNERS = {
    "none": lambda e, m: np.ones(len(e.group_B), bool),
    "prompts": lambda e, m: np.asarray(e.group_B) % COUNT == m,
    "responses": lambda e, m: np.asarray(e.episode_B) % COUNT == m,
}


@pytest.mark.parametrize(
    ("head", "split", "share"),
    [
        pytest.param(HLGaussHead(bins=5), "responses", True, marks=pytest.mark.slow),
        pytest.param(LinearHead(), "none", True, marks=pytest.mark.slow),
        pytest.param(ArctanHead(), "prompts", False, marks=pytest.mark.slow),
    ],
    ids=lambda x: x.type if not isinstance(x, str | bool) else str(x),
)
def test_a_member_steps_as_it_would_alone(head: ValueHead, split: Any, share: bool) -> None:
    batch, layout = minibatch(share=share)
    batch = for_members(batch)
    model = replace(CRITIC, head=head, count=COUNT)
    starts = [params(model.member, seed) for seed in range(COUNT)]
    state, metrics = step(model, join(starts), batch, config_of(head, split=split, count=COUNT), layout)
    losses = []
    for m in range(COUNT):
        part = member(batch, m, OWNERS[split](batch.experience, m))
        alone, lone = step(model.member, starts[m], part, config_of(head), layout)
        assert_close(jax.tree.map(lambda x, m=m: x[m], state), alone)
        losses.append(lone["critic/loss"])
        moved = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(
            jax.tree.leaves(alone.params), jax.tree.leaves(starts[m]), strict=True))  # fmt: skip
        assert moved > 1e-4
    assert metrics["critic/loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_member_without_rows_or_with_bad_ones_does_not_move_and_stops_no_other() -> None:
    batch, layout = minibatch()
    batch = for_members(batch)
    e = batch.experience
    batch = batch._replace(
        experience=e._replace(group_B=jnp.where(e.group_B % 3 == 2, 0, e.group_B)),  # nothing is left for critic 2
        return_MBT=batch.return_MBT.at[1].set(jnp.nan),  # type: ignore[union-attr]
    )
    model = replace(CRITIC, count=COUNT)
    starts = join([params(CRITIC, seed) for seed in range(COUNT)])
    state, metrics = step(model, starts, batch, config_of(LinearHead(), split="prompts", count=COUNT), layout)
    for m, moves in enumerate((True, False, False)):
        same = [np.array_equal(a[m], b[m]) for a, b in zip(*map(jax.tree.leaves, (state.params, starts)), strict=True)]
        assert not any(same) if moves else all(same)
    assert state.skipped.tolist() == [[0, 0], [1, 1], [0, 0]] and skipped_in_a_row(state) == 1
    assert state.step.tolist() == [1, 0, 0] and metrics["critic/skipped"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=pytest.mark.slow) for m in (MeshConfig(fsdp=2, tensor=2), MeshConfig(data=4))]
)
def test_meshes_change_nothing(mesh: MeshConfig) -> None:
    model = replace(CRITIC, head=ArctanHead(), count=2)
    starts = join([params(model.member, seed) for seed in range(2)])
    config = config_of(ArctanHead(), split="responses", count=2)
    want, want_metrics = step(model, starts, for_members(minibatch()[0], 2), config, Layout())
    got, metrics = step(model, starts, for_members(minibatch(mesh)[0], 2), config, Layout(), mesh)
    assert got.params["trunk"]["layers"]["q"].sharding.shard_shape((2, 1, 32, 32)) == (
        2, 1, 32 // mesh.fsdp, 32 // mesh.tensor,
    )  # fmt: skip
    assert_close(got, want)
    assert metrics == pytest.approx(want_metrics, rel=1e-5, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(expert=2), MeshConfig(expert=2, tensor=2)], ids=str)
def test_critics_with_experts_step_alike_where_experts_are_spread(mesh: MeshConfig) -> None:
    moe = MoESpec(experts=4, chosen=2, ffn=8)
    spec = DecoderSpec(layers=1, width=16, heads=2, kv_heads=2, head_width=8, ffn=16, vocab=48, moe=moe)
    config, moves = config_of(LinearHead(), count=2), []
    for where in (MeshConfig(), mesh):
        model = ModelDef(spec, head=LinearHead(), count=2, mesh=where.build())
        starts = join([params(model.member, seed) for seed in range(2)])
        state, _ = step(model, starts, for_members(minibatch(where)[0], 2), config, Layout(), where)
        moves.append(jax.device_get(state.params))
    assert_close(*moves)


def test_disagreement_is_logged_for_more_than_one() -> None:
    batch = for_members(minibatch()[0], 2)
    e = batch.experience
    action = np.asarray(e.action_BT)
    want = np.asarray(e.value_MBT).std(0)[action].mean()
    assert advantage_metrics(batch, 1.0)["critic/value_std"] == pytest.approx(want, rel=1e-5)
    assert "critic/value_std" not in advantage_metrics(member(batch, 0), 1.0)
