"""The trainer on a tiny model: it compiles once, agrees with its sampler, and goes on exactly from where it was."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

from ppojax.config import Config
from ppojax.errors import ConfigError, DataError, DivergedError
from ppojax.experience.summary import advantage_metrics
from ppojax.trainer import Trainer, build
from tiny_config import tiny

CLOCKS = ("timing_s/", "perf/", "compile/")


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(CLOCKS)}


def leaves(state: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_tasks_are_looked_at_before_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load_model", lambda *a: pytest.fail("weights were loaded"))
    config = Config.load("model.path=smollm2", "env.type=jsonl", "env.path=no.jsonl", "env.reward.exact.weight=1")
    with pytest.raises(DataError, match=r"no\.jsonl: cannot be read"):
        Trainer(config)


def test_five_steps() -> None:
    """One run, looked at from several sides, because compiling it is what takes time."""
    trainer = Trainer(tiny("critic.updates=2"))
    trainer.warm_start()
    before = jax.device_get(trainer.state())
    outs = []
    for _ in range(3):
        outs.append(trainer.step())
    middle = jax.device_get(trainer.state())
    position = json.loads(json.dumps(trainer.position()))
    outs += [trainer.step() for _ in range(2)]
    assert [out.step for out in outs] == [1, 2, 3, 4, 5] and trainer.number == 5
    for out in outs:
        assert all(np.isfinite(value) for value in out.metrics.values())

    # All lengths are in one bucket, so nothing compiles after the first steps.
    counts = [out.metrics["compile/count"] for out in outs]
    assert counts[1] == counts[4] and counts[0] > 0, counts

    # Two float32 computations of the same log-probability, of order 10, one block deep.
    for out in outs:
        assert out.metrics["sampling/logp_diff_max"] < 2e-5
        assert out.metrics["sampling/ratio_mean"] == pytest.approx(1, abs=1e-5)

    assert any(out.metrics["reward/max"] > 0 for out in outs)

    # Of each token the trace says what DPPO did with it, in the order of the batch, though minibatches are shuffled.
    for out in outs:
        e, a_BT, trace = out.batch.experience, np.asarray(out.batch.advantage_BT), out.trace
        assert trace is not None
        action_BT, rise_BT = np.asarray(e.action_BT), trace.ratio_BT - 1
        tv_BT = np.exp(np.asarray(e.logp_behavior_BT)) * np.abs(rise_BT)
        outside_BT = (a_BT * rise_BT > 0) & (tv_BT > 0.2)
        np.testing.assert_array_equal(trace.ratio_BT > 0, action_BT)
        np.testing.assert_array_equal(trace.mask_BT, action_BT & (a_BT != 0) & ~outside_BT)
        # One half was read before anything moved, the other half after the first optimizer step.
        moved_B = np.abs(np.where(action_BT, rise_BT, 0)).max(axis=1) > 1e-4
        assert moved_B.sum() == 4, moved_B

    # Everything that should be trained is, and the critic's head has left zero.
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, jax.device_get(trainer.state()))
    assert all(jax.tree.leaves(moved["actor"].params)) and all(jax.tree.leaves(moved["critic"].params))
    assert int(trainer.states.actor.step) == 10 and int(trainer.states.critic.step) == 20  # type: ignore[union-attr]

    # The log's numbers on the critic are of the values before the update.
    assert outs[4].metrics.items() >= advantage_metrics(outs[4].batch, 1.0).items()

    # Two steps again from the middle are the same two steps, bit by bit.
    again = Trainer(tiny("critic.updates=2"))
    template = again.state()
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), middle, template)
    again.restore(placed, position)
    repeated = [again.step() for _ in range(2)]
    for new, old in zip(repeated, outs[3:], strict=True):
        assert new.step == old.step and timeless(new.metrics) == timeless(old.metrics)
        assert [row.token.tolist() for row in new.rollout.rows] == [row.token.tolist() for row in old.rollout.rows]
    assert same(again.state(), trainer.state())


def test_without_a_critic_and_with_what_the_loss_asks_for() -> None:
    trainer = Trainer(
        tiny("advantage.type=group", "loss.type=ppo", "loss.kl.coefficient=0.1", "loss.entropy_coefficient=0.1")
    )
    assert trainer.states.critic is None
    reference = jax.device_get(trainer.reference)
    out = trainer.step()
    e = out.batch.experience
    assert e.value_MBT is None and e.logp_old_BT is not None and e.logp_ref_BT is not None
    np.testing.assert_array_equal(e.logp_old_BT, e.logp_ref_BT)  # before the first update they are one
    assert out.trace is not None
    # Rewards are all 0, so are the advantages; what has moved since the rows were scored draws back (its KL).
    old_BT = np.where(e.action_BT, np.exp(e.logp_old_BT - e.logp_behavior_BT), 0)  # type: ignore[operator]
    moved_BT = np.abs(out.trace.ratio_BT - old_BT) > 1e-4
    assert 0 < moved_BT.any(axis=1).sum() <= 4 and out.trace.mask_BT[moved_BT].all()
    e = trainer.step().batch.experience
    assert not np.array_equal(e.logp_old_BT, e.logp_ref_BT)  # type: ignore[arg-type]
    assert same(trainer.reference, reference) and not same(trainer.states.actor.params, reference)
    assert not any(name.startswith("critic/v") for name in out.metrics)


def test_the_critic_may_learn_alone_first() -> None:
    trainer = Trainer(tiny("critic.warmup_steps=1"))
    trainer.warm_start()
    before = jax.device_get(trainer.state())
    out = trainer.step()
    assert not any(name.startswith("actor/") for name in out.metrics) and out.trace is None
    assert same(trainer.states.actor, before["actor"]) and not same(trainer.states.critic, before["critic"])
    assert "actor/loss" in trainer.step().metrics


def test_gradients_that_are_not_finite_stop_the_run() -> None:
    """The first update of a NaN model is refused; the run ends after max_skipped of them, its state untouched."""
    trainer = Trainer(tiny("update.max_skipped=3"))
    trainer.states.actor = trainer.states.actor._replace(
        params=trainer.states.actor.params | {"norm": trainer.states.actor.params["norm"] * np.float32(np.nan)}
    )
    before = jax.device_get(trainer.states.actor)
    trainer.step()
    assert int(trainer.states.actor.skipped[1]) == 2
    with pytest.raises(DivergedError) as caught:
        trainer.step()
    assert str(caught.value) == (
        "actor: gradients were not finite in 4 updates in a row (update.max_skipped): "
        "lower actor.optimizer.learning_rate or look at the last transcripts"
    )
    after = jax.device_get(trainer.states.actor)
    assert after.skipped.tolist() == [4, 4]
    for a, b in zip(leaves(after._replace(skipped=0)), leaves(before._replace(skipped=0)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_after_a_warm_start_the_critic_is_cut_from_the_warm_policy() -> None:
    trainer = Trainer(tiny("warm_start.steps=3", "loss.kl.coefficient=0.1"))
    cold = jax.device_get(trainer.states.actor.params)
    trainer.warm_start()
    actor, critic = trainer.states.actor.params, trainer.states.critic
    assert critic is not None and not same(actor["embed"], cold["embed"])
    assert same(critic.params["trunk"]["embed"], actor["embed"]) and same(trainer.reference, actor)
    assert same(critic.params["trunk"]["layers"], jax.tree.map(lambda x: x[:1], actor["layers"]))


@pytest.mark.parametrize("name", ["seed", "tokenizer"])
def test_another_run_s_state_is_refused(name: str) -> None:
    trainer = Trainer(tiny())
    with pytest.raises(DataError, match=rf"resume: the checkpoint was written with {name} 7, this run has "):
        trainer.restore(trainer.state(), trainer.position() | {name: 7})


def test_warm_start_fits_and_starts_the_optimizer_anew() -> None:
    trainer = Trainer(tiny("warm_start.steps=8"))
    losses = trainer.warm_start()
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    assert int(trainer.states.actor.step) == 0 and trainer.number == 0
    assert not any(x.any() for x in leaves(trainer.states.actor.opt_state))


def test_a_demonstration_longer_than_the_policy_may_write_is_refused() -> None:
    """The expert's call has 16 characters, and its answer and the last eos follow."""
    trainer = Trainer(tiny("warm_start.steps=1", "rollout.max_turn_tokens=6"))
    with pytest.raises(DataError) as caught:
        trainer.warm_start()
    assert str(caught.value) == (
        "warm_start: a demonstration writes 18 tokens, rollout.max_turn_tokens x "
        "env.max_turns allows 12: raise rollout.max_turn_tokens"
    )


def test_a_mesh_that_does_not_divide_is_refused() -> None:
    """The vocabulary is known only once the tokenizer is."""
    with pytest.raises(ConfigError, match=r"mesh\.tensor = 4 does not divide vocab = 102; legal: 1, 2, 3"):
        Trainer(tiny("mesh.tensor=4", "model.fresh.heads=4", "model.fresh.kv_heads=4"))


@pytest.mark.slow
def test_an_ensemble_of_bounded_critics() -> None:
    """Advantages are made of their mean; each learns from its own episodes, and they come to disagree.

    Fitted by cross-entropy, to rewards that are learned from as -1 to 1 and told as they were earned.
    """
    critics = ("critic.count=2", "critic.split=responses", "critic.head.type=arctan", "critic.head.low=-1")
    learnt = ("critic.loss.cross_entropy=true", "reward_scaling.target_min=-1")
    trainer = Trainer(tiny(*critics, *learnt, "warm_start=null"))
    outs = [trainer.step() for _ in range(2)]
    critic = trainer.states.critic
    assert critic is not None and critic.step.tolist() == [4, 4]
    value_MBT = outs[1].batch.experience.value_MBT
    assert value_MBT is not None and value_MBT.shape[0] == 2
    action_BT = outs[1].batch.experience.action_BT
    assert np.all(np.abs(np.asarray(value_MBT)[:, action_BT]) < 1)
    returned = np.asarray(outs[0].batch.return_MBT)[:, np.asarray(outs[0].batch.experience.action_BT)]
    assert returned.min() == pytest.approx(-1, abs=1e-5) and 0 <= outs[0].metrics["reward/mean"] < 1
    assert outs[0].metrics["critic/value_std"] > 0 and np.isfinite(list(outs[1].metrics.values())).all()
    after = jax.device_get(critic.params)
    assert not any(np.array_equal(leaf[0], leaf[1]) for leaf in jax.tree.leaves(after))


def test_controls_follow_what_is_measured_and_survive_a_restart() -> None:
    """KL inside the reward, an entropy control and dynamic sampling in one run; `restore` takes them back.

    The critic is told the answers, and its attention stands still.
    """
    trainer = Trainer(
        tiny(
            "kl_reward.coefficient=0.1",
            "kl_reward.target=1e-6",
            "kl_reward.horizon=8",
            "loss.entropy_coefficient=0.01",
            "loss.entropy_control.target=100",
            "loss.positive_nll=0.1",
            "rollout.dynamic_rounds=2",
            "critic.privileged=4",
            "critic.freeze=attention",
            "warm_start=null",
        )
    )
    assert trainer.states.critic is not None
    before = jax.device_get(trainer.states.critic.params)
    outs = [trainer.step() for _ in range(2)]
    after = jax.device_get(trainer.states.critic.params)
    assert same(before["trunk"]["layers"]["q"], after["trunk"]["layers"]["q"]) and not same(before, after)
    hint_length_B = np.asarray(outs[0].batch.experience.hint_length_B)
    assert hint_length_B.min() >= 1 and hint_length_B.max() <= 4
    first, second = (out.metrics for out in outs)
    assert (first["actor/entropy_scale"], second["actor/entropy_scale"]) == (1.0, 1.1)
    assert first["actor/reward_kl_penalty_coeff"] == 0.1 and first["actor/reward_kl_penalty"] == 0
    # The policy has not left the reference: the KL is under its target, and the coefficient falls by a fifth.
    assert second["actor/reward_kl_penalty_coeff"] == pytest.approx(0.08) and second["actor/reward_kl_penalty"] != 0
    assert first["dynamic/rounds"] == 2 and first["dynamic/kept_frac"] == 0 and "actor/positive_nll" in first
    assert len(outs[0].rollout.rows) == 8
    state, position = jax.device_get(trainer.state()), json.loads(json.dumps(trainer.position()))
    third = trainer.step().metrics
    trainer.restore(jax.device_put(state), position)
    again = trainer.step().metrics
    assert timeless(again) == timeless(third)
