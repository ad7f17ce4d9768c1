"""Weights on their way from the trainer to a sampler of another type, on another mesh, in whole steps."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import SPEC
from ppojax.errors import ConfigError
from ppojax.models.forward import ModelDef, Params, action_states, head_VD, logits, score_tokens
from ppojax.models.spec import MoESpec
from ppojax.trainer import Trainer, build
from ppojax.trainer.trainer import StepOut
from ppojax.types import Experience, Layout
from tiny_config import tiny

# No reward is earned by a fresh model: the entropy bonus is what moves it.
PLAIN = ("warm_start=null", "advantage.type=group", "loss.entropy_coefficient=0.3")


@pytest.mark.slow
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


@pytest.mark.slow
def test_stale_weights_are_those_of_steps_ago() -> None:
    """What was recorded is the log-probability under the weights of two steps before, gathered from two devices;
    nothing compiles after the first step, and resuming changes no bit."""
    mesh = ("mesh.fsdp=2", "rollout.mesh.data=2")
    config = tiny(*PLAIN, *mesh, "rollout.mismatch.stale_steps=2", "rollout.record_hidden=true", "loss.type=ppo")
    trainer = Trainer(config)
    weights, outs, saved = [], [], []
    for _ in range(4):
        weights.append(jax.device_get(trainer.policy()))
        saved.append((jax.device_get(trainer.state()), json.loads(json.dumps(trainer.position()))))
        outs.append(trainer.step())
    score = jax.jit(score_tokens, static_argnames=("model", "temperature"))
    for n, out in enumerate(outs):
        e = out.batch.experience
        gap = {
            m: float(np.abs(score(trainer.parts.actor, w, e, temperature=1.0).logp - e.logp_behavior_BT).max())
            for m, w in enumerate(weights)
        }
        # As `test_five_steps` has it; weights of other steps are further off.
        assert gap[max(n - 2, 0)] < 2e-5 < 1e-3 < min(g for m, g in gap.items() if m != max(n - 2, 0))
    assert outs[0].metrics["sampling/tv_max"] < 2e-6 and outs[1].metrics["sampling/tv_mean"] > 1e-4
    assert all(out.metrics["timing_s/sync"] > 0 for out in outs)
    assert outs[1].metrics["compile/count"] == outs[3].metrics["compile/count"]
    # The exact gap of the log is over the same weights: the sampler's head is as old as its hidden states.
    assert outs[3].metrics["sampling/tv_max"] < 0.5

    again = Trainer(config)
    again.restore(
        jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), saved[2][0], again.state()), saved[2][1]
    )
    repeated = [again.step() for _ in range(2)]
    for new, old in zip(repeated, outs[2:], strict=True):
        assert _tokens(new) == _tokens(old) and new.metrics["actor/loss"] == old.metrics["actor/loss"]
    for x, y in zip(jax.tree.leaves(again.state()), jax.tree.leaves(trainer.state()), strict=True):
        np.testing.assert_array_equal(x, y)


def test_exact_sampling() -> None:
    """What is recorded is what the trainer scores, to the bit, and what the update starts from but for roundings."""
    trainer = Trainer(tiny(*PLAIN, "rollout.exact=true", "update.shared_prefix=false", "loss.type=ppo"))
    largest = jax.jit(_largest_logit, static_argnames=("model",))
    for _ in range(2):
        policy = jax.tree.map(lambda p: p.copy(), trainer.policy())
        out = trainer.step()
        e = out.batch.experience
        action_BT = np.asarray(e.action_BT)
        assert e.token_BT.shape[1] == 64 and e.logp_old_BT is not None
        np.testing.assert_array_equal(np.asarray(e.logp_old_BT)[action_BT], np.asarray(e.logp_behavior_BT)[action_BT])
        # The update keeps what its backward pass needs, and is another program: single roundings of logits, of their
        # log-sum-exp, and of the difference of the two, none of which is larger than the largest number among them.
        logp = float(np.abs(np.asarray(e.logp_behavior_BT)[action_BT]).max())
        ulp = np.spacing(np.float32(max(float(largest(policy, e, model=trainer.parts.actor)), logp)))
        assert out.metrics["sampling/logp_diff_max"] <= 4 * ulp
        assert out.metrics["sampling/redrawn_frac"] < 0.01


def _largest_logit(params: Params, e: Experience, model: ModelDef) -> jax.Array:
    """The smallest over the actions of the largest |logit|."""
    hidden_BAD, _ = action_states(model, params, e, Layout())
    largest_BA = jnp.max(jnp.abs(logits(model, head_VD(params), hidden_BAD)), axis=-1)
    return jnp.min(jnp.where(e.action_index_BA > 0, largest_BA, jnp.inf))


def test_exact_sampling_where_it_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known only when the model and the devices are."""
    config = tiny("rollout.exact=true", "update.shared_prefix=false")
    moe = ModelDef(SPEC.model_copy(update={"moe": MoESpec(experts=4, chosen=2, ffn=16)}))
    said = "where the same row is not computed the same way in every batch; it holds for dense models on a CPU: set"
    with pytest.raises(ConfigError) as caught:
        build._judge(config, moe)
    assert str(caught.value) == f"rollout.exact=true: this model has experts, {said} rollout.exact=false"
    monkeypatch.setattr(build, "platform_of", lambda mesh: "gpu")
    with pytest.raises(ConfigError) as caught:
        build._judge(config, ModelDef(SPEC))
    assert str(caught.value) == f"rollout.exact=true: these devices are gpu, {said} rollout.exact=false"
    assert build._judge(tiny(), ModelDef(SPEC)) is None


def _tokens(out: StepOut) -> list[list[int]]:
    return [row.token.tolist() for row in out.rollout.rows]


@pytest.mark.slow
def test_injected_gaps_are_measured() -> None:
    """Noise shows in the log in proportion to its deviation; an int8 cache too, and neither in what is played off."""
    mean = {}
    for gap in ("logit_noise=0.05", "logit_noise=0.1", "logit_noise=0.2", "cache=int8", "stale_steps=0"):
        # A thousand tokens: their mean is known to 3%.
        out = Trainer(
            tiny(*PLAIN, "rollout.group_size=16", "update.microbatch_rows=32", f"rollout.mismatch.{gap}")
        ).step()
        mean[gap] = out.metrics["sampling/logp_diff_mean"]
    assert mean["stale_steps=0"] < 2e-6 and 1e-4 < mean["cache=int8"] < 0.05
    one, two, four = (mean[f"logit_noise={d}"] for d in (0.05, 0.1, 0.2))
    assert two / one == pytest.approx(2, rel=0.2) and four / two == pytest.approx(2, rel=0.2)
