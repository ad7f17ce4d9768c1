"""Weights on their way from the trainer to a sampler of another type, on another mesh, in whole steps."""

from __future__ import annotations

import jax.numpy as jnp

from ppojax.models.forward import head_VD
from ppojax.trainer import Trainer
from tiny_config import tiny

# No reward is earned by a fresh model: the entropy bonus is what moves it.
PLAIN = ("warm_start=null", "advantage.type=group", "loss.entropy_coefficient=0.3")


def test_a_sampler_of_another_type_on_another_mesh() -> None:
    """bfloat16 under float32, rows over devices that split the weights in training; the loss compares with its head."""
    trainer = Trainer(tiny(*PLAIN, "mesh.fsdp=2", "rollout.mesh.data=2", "rollout.dtype=bfloat16", "loss.support=full"))
    head = trainer._heads(trainer.sampler_policy()).behavior
    assert head is not None and head.dtype == jnp.bfloat16
    own = head_VD(trainer.policy())
    assert head.sharding.is_equivalent_to(own.sharding, 2) and jnp.array_equal(head, own.astype(jnp.bfloat16))
    outs = [trainer.step() for _ in range(3)]
    assert outs[0].rollout.rows[0].recorded.hidden.dtype == jnp.bfloat16
    assert outs[1].metrics["compile/count"] == outs[2].metrics["compile/count"]
    for out in outs:
        assert out.metrics["timing_s/sync"] > 0
        # bfloat16 keeps 8 bits: of log-probabilities of order 5, a few hundredths; and there is a difference.
        assert 1e-4 < out.metrics["sampling/logp_diff_max"] < 0.1
        assert 1e-5 < out.metrics["sampling/tv_max"] < 2e-2
