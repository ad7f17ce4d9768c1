"""The trust region over each support, in whole steps: in order on every token, and the same on every mesh."""

from __future__ import annotations

from functools import lru_cache
from typing import get_args

import jax
import numpy as np
import pytest

from ppojax.errors import ConfigError
from ppojax.kernels import Implementation
from ppojax.models.spec import StatisticsChoice
from ppojax.trainer import Trainer
from ppojax.trainer.trainer import StepOut
from tiny_config import tiny

# No reward is earned by a fresh model: the entropy bonus is what moves it.
PLAIN = ("warm_start=null", "advantage.type=group", "loss.entropy_coefficient=0.3", "loss.top_k=5")
MESH = ("mesh.data=2", "mesh.tensor=2")


@lru_cache
def steps(*arguments: str) -> tuple[StepOut, ...]:
    trainer = Trainer(tiny(*PLAIN, *arguments))
    return tuple(trainer.step() for _ in range(2))


def in_order(outs: tuple[StepOut, ...]) -> None:
    for out in outs:
        assert all(np.isfinite(value) for value in out.metrics.values())
        assert out.metrics["trust_region/order_violation_frac"] == 0
        assert out.metrics["trust_region/tv_max"] > 1e-4  # the policy has moved between the minibatches


@pytest.mark.parametrize(
    "arguments",
    [
        ("loss.support=full", "loss.compare_supports=true", "loss.kl.coefficient=0.1", "loss.kl.estimator=full"),
        ("loss.support=topk",),
        pytest.param(("loss.support=full", "loss.divergence=kl", "model.dtype=bfloat16"), marks=pytest.mark.slow),
        pytest.param(("loss.compare_supports=true", "advantage.type=gae"), marks=pytest.mark.slow),
        # The sampler's head is a frozen matrix of its own here, and not of the compute type.
        pytest.param(
            ("loss.support=full", "model.lora.rank=4", "model.base_dtype=bfloat16", "model.fresh.tied=false"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_steps_in_order(arguments: tuple[str, ...]) -> None:
    outs = steps(*arguments)
    in_order(outs)
    e, row = outs[0].batch.experience, outs[0].rollout.rows[0]
    kept, m = row.recorded, row.action.sum()
    assert jax.tree.leaves(e.recorded) == [] and e.hidden_ref_BAD is None  # which the step leaves behind
    if "loss.support=topk" in arguments:
        assert kept.top_id.shape == kept.top_logp.shape == (m, 5) and kept.hidden is None
        assert "sampling/tv_mean" not in outs[0].metrics
        return
    assert kept.hidden.shape == (m, 32)
    assert (kept.top_id is None) == ("loss.compare_supports=true" not in arguments)
    # Before the first update the trainer's policy is the sampler's, over the whole vocabulary; later it is not.
    exact = outs[0].metrics["sampling/tv_max"]
    assert exact < (2e-2 if "model.dtype=bfloat16" in arguments else 2e-6) < outs[0].metrics["trust_region/tv_max"]
    if "loss.kl.estimator=full" in arguments:
        assert e.logp_ref_BT is None
        assert 0 < outs[0].metrics["actor/kl_loss"] < outs[1].metrics["actor/kl_loss"]


@pytest.mark.slow
def test_a_mesh_changes_nothing() -> None:
    arguments = ("loss.support=full", "loss.compare_supports=true", "loss.kl.coefficient=0.1", "loss.kl.estimator=full")
    alone, spread = steps(*arguments), steps(*arguments, *MESH)
    for a, b in zip(alone, spread, strict=True):
        assert [row.token.tolist() for row in a.rollout.rows] == [row.token.tolist() for row in b.rollout.rows]
        names = [n for n in a.metrics if n.startswith(("trust_region/", "actor/"))]
        assert {"trust_region/tv_mean", "trust_region/kl_mean", "actor/kl_loss", "actor/entropy"} <= set(names)
        for name in names:
            # float32 sums in another order; where policies agree, their rounding is all there is.
            assert b.metrics[name] == pytest.approx(a.metrics[name], rel=2e-3, abs=2e-6), name


def test_the_sampler_s_head_lies_as_the_head() -> None:
    trainer = Trainer(tiny(*PLAIN, "loss.support=full", *MESH))
    heads, embed = trainer._heads(trainer.policy()), trainer.states.actor.params["embed"]
    assert heads.behavior is not None and heads.reference is None
    assert heads.behavior.sharding.is_equivalent_to(embed.sharding, 2)
    assert heads.behavior.addressable_shards[0].data.unsafe_buffer_pointer() != (
        embed.addressable_shards[0].data.unsafe_buffer_pointer()
    )
    plain = Trainer(tiny(*PLAIN))
    assert jax.tree.leaves(plain._heads(plain.policy())) == []


def test_more_tokens_than_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        Trainer(tiny(*PLAIN, "loss.support=topk", "loss.top_k=103"))
    assert str(caught.value) == (
        "loss.top_k=103: the vocabulary has 102 tokens; set loss.top_k to 102 or less, or loss.support=full"
    )


def test_statistics_of_another_platform() -> None:
    with pytest.raises(ConfigError) as caught:
        Trainer(tiny("model.statistics=pallas_gpu"))
    assert str(caught.value) == (
        "model.statistics=pallas_gpu: token_stats: implementation='pallas_gpu' runs on gpu, and these arrays are on "
        "cpu: leave it out, or give 'tiled'"
    )


def test_the_config_knows_every_implementation() -> None:
    assert get_args(StatisticsChoice) == get_args(Implementation)
