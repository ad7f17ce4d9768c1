"""A step is the same step, however its rows are cut up, padded, ordered and laid over devices.

Gradients are float32 sums of some hundred terms in another order. With eps = 1 the first AdamW update is
lr g / (|g| + 1), smooth in the gradient, so that parameters are compared as gradients are: to 2e-5 of the largest.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest
from random_batch import minibatch, minibatch_rows

from helpers import ACTOR, CRITIC, params
from ppojax.losses import DPPO, PPOClip, ValueLoss
from ppojax.mesh import MeshConfig
from ppojax.types import Batch, Ending, Layout
from ppojax.update.actor import actor_step
from ppojax.update.critic import critic_step
from ppojax.update.settings import CriticConfig, OptimizerConfig
from ppojax.update.state import init_state

OPTIMIZER = OptimizerConfig(learning_rate=1.0, eps=1.0, max_grad_norm=1e6)
CRITIC_CONFIG = CriticConfig(optimizer=OPTIMIZER, loss=ValueLoss(clip=0.3))
LOSSES = {"dppo": DPPO(entropy_coefficient=0.01), "ppo": PPOClip()}
KINDS = ("dppo", "ppo", "critic")


def step(
    kind: str, batch: Batch, layout: Layout, microbatch_rows: int, mesh: MeshConfig | None = None
) -> tuple[Any, dict[str, float]]:
    """What one step moves each parameter by, and its metrics."""
    built = (mesh or MeshConfig()).build()
    if kind == "critic":
        start = params(CRITIC)
        state = init_state(CRITIC, start, CRITIC_CONFIG.build_optimizer(), built)
        state, metrics = critic_step(
            state, batch, model=CRITIC, config=CRITIC_CONFIG, layout=layout, microbatch_rows=microbatch_rows, mesh=built
        )
    else:
        actor, start = replace(ACTOR, mesh=built), params(ACTOR)
        state = init_state(actor, start, OPTIMIZER.build(), built)
        state, metrics = actor_step(
            state, batch, model=actor, loss=LOSSES[kind], optimizer=OPTIMIZER, temperature=0.9, layout=layout,
            microbatch_rows=microbatch_rows, mesh=built,
        )  # fmt: skip
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, start)
    return moved, {name: float(value) for name, value in metrics.items()}


@lru_cache
def reference(kind: str) -> tuple[Any, dict[str, float]]:
    """All rows at once on one device, with separate prompts."""
    batch, layout = minibatch()
    return step(kind, batch, layout, 8)


def assert_same(got: tuple[Any, dict[str, float]], kind: str) -> None:
    moved, metrics = got
    want_moved, want_metrics = reference(kind)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want_moved))
    assert largest > 1e-3
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(want_moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * largest)
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(want_metrics[name], rel=2e-5, abs=1e-6), name


def test_the_reference_is_worth_comparing_with() -> None:
    """Some tokens are outside of the trust region, some clipped, and nothing is zero by accident."""
    _, dppo = reference("dppo")
    assert 0 < dppo["trust_region/masked_frac"] < 1 or dppo["trust_region/tv_max"] > 0
    assert 0 < reference("ppo")[1]["actor/pg_clipfrac"] < 1
    assert 0 < reference("critic")[1]["critic/vf_clipfrac"] < 1


def cases(chosen: dict[str, tuple[str, ...]]) -> list[Any]:
    """Every case with every kind of step; those not chosen are slow, for each is a program to compile."""
    return [
        pytest.param(case, kind, id=f"{case}-{kind}", marks=() if kind in kinds else pytest.mark.slow)
        for case, kinds in chosen.items()
        for kind in KINDS
    ]


MICROBATCHES = {"1": (1, False), "2 shared": (2, True), "4": (4, False), "8 shared": (8, True)}


@pytest.mark.parametrize(("case", "kind"), cases({"1": (), "2 shared": ("dppo", "critic"), "4": (), "8 shared": ()}))
def test_microbatches_and_shared_prompts_change_nothing(case: str, kind: str) -> None:
    microbatch_rows, share = MICROBATCHES[case]
    batch, layout = minibatch(share=share)
    assert (layout.group == 2) == share
    assert_same(step(kind, batch, layout, microbatch_rows), kind)


MESHES = {
    "4x1x1": (MeshConfig(data=4), 4, False),
    "2x2x1": (MeshConfig(data=2, fsdp=2), 8, True),
    "1x4x1": (MeshConfig(fsdp=4), 8, False),
    "1x1x4": (MeshConfig(tensor=4), 2, True),
    "2x1x2": (MeshConfig(data=2, tensor=2), 4, True),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    cases({"4x1x1": (), "2x2x1": ("dppo",), "1x4x1": ("critic",), "1x1x4": (), "2x1x2": ("dppo",)}),
)
def test_meshes_change_nothing(case: str, kind: str) -> None:
    config, microbatch_rows, share = MESHES[case]
    batch, layout = minibatch(config, share)
    assert_same(step(kind, batch, layout, microbatch_rows, config), kind)


@pytest.mark.parametrize("kind", ["dppo", "critic"])
def test_padding_order_and_empty_rows_change_nothing(kind: str) -> None:
    rows = minibatch_rows()
    order = np.random.default_rng(1).permutation(8)
    batch, layout = minibatch(rows=[rows[i] for i in order], batch=12, bucket=16)
    assert_same(step(kind, batch, layout, 4), kind)


@pytest.mark.parametrize("kind", ["dppo", "critic"])
def test_a_failed_row_might_as_well_not_be_there(kind: str) -> None:
    rows = minibatch_rows()
    assert rows[-1].ending == Ending.ERROR
    nonsense = replace(rows[-1], token=rows[-1].token[::-1], logp_behavior=rows[-1].logp_behavior - 50)
    batch, layout = minibatch(rows=[*rows[:-1], nonsense])
    assert_same(step(kind, batch, layout, 8), kind)
