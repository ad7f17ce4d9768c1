"""Whole steps with states in the host's memory, and with critics on a mesh of their own."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.settings import CheckpointConfig
from ppojax.trainer import Trainer
from tiny_config import tiny

BASE = ("warm_start.steps=2", "mesh.fsdp=2", "critic.count=2")
OFFLOAD = ("actor.offload=optimizer", "critic.offload=all")


def kind_of(x: jax.Array) -> str | None:
    return x.sharding.memory_kind


def run(*arguments: str) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = Trainer(tiny(*BASE, *arguments))
    trainer.warm_start()
    metrics = [trainer.step().metrics for _ in range(2)]
    return trainer, [
        {k: v for k, v in m.items() if not k.startswith(("timing_s/", "perf/", "compile/"))} for m in metrics
    ]


@pytest.mark.slow
def test_offloading_changes_no_bit_and_critics_elsewhere_next_to_nothing(tmp_path: Path) -> None:
    plain, want = run()
    resting, got = run(*OFFLOAD)
    assert got == want
    for a, b in zip(jax.tree.leaves(resting.state()), jax.tree.leaves(plain.state()), strict=True):
        np.testing.assert_array_equal(a, b)
    actor, critic = resting.states.actor, resting.states.critic
    assert critic is not None
    host = [*jax.tree.leaves(actor.opt_state), *jax.tree.leaves((critic.opt_state, critic.params))]
    assert {kind_of(x) for x in host} == {"pinned_host"}
    assert {kind_of(x) for x in jax.tree.leaves(actor.params)} == {"device"}

    # A checkpoint comes back to where it was taken from, and the run goes on as it would have.
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(2, resting.state(), resting.position(), block=True)
        back = Trainer(tiny(*BASE, *OFFLOAD))
        back.restore(*checkpoints.restore(None, back.state()))
    for a, b in zip(jax.tree.leaves(back.state()), jax.tree.leaves(resting.state()), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim) and kind_of(a) == kind_of(b)
    back.step(), plain.step()
    for a, b in zip(jax.tree.leaves(back.state()), jax.tree.leaves(plain.state()), strict=True):
        np.testing.assert_array_equal(a, b)

    _, other = run("critic.mesh.data=2", "critic.optimizer.over_data=true", "actor.optimizer.over_data=true")
    # Of the first step, which is played before anything was learnt: sums in another order.
    for name, value in want[0].items():
        assert other[0][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
