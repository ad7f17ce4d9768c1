"""Runs with adapters: what moves, what a checkpoint holds, and which base it goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.errors import DataError
from ppojax.models.lora import merge
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.settings import CheckpointConfig
from ppojax.trainer import Trainer
from ppojax.update.state import abstract_state
from tiny_config import tiny

ADAPTERS = (
    "model.lora.rank=4",
    "critic.lora.rank=4",
    "critic.lora.dropout=0.2",
    "warm_start.steps=5",
    "loss.kl.coefficient=0.1",
)
MOVES = "loss.entropy_coefficient=0.1"  # after five steps of warm start no reward is earned


def equal(a: Any, b: Any) -> list[bool]:
    return [np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]


def copy(tree: Any) -> Any:
    return jax.tree.map(np.array, jax.device_get(tree))


def test_a_run_trains_saves_and_resumes_adapters_only(tmp_path: Path) -> None:
    trainer = Trainer(tiny(*ADAPTERS, MOVES))
    bases = copy((trainer.parts.actor_base, trainer.parts.critic_base))
    trainer.warm_start()
    warm = copy(trainer.states.actor.params)
    critic = trainer.states.critic
    assert critic is not None
    # The critic has the actor's kind of adapters: it starts from the warm ones.
    assert all(equal(critic.params["trunk"]["layers"]["lora"], warm["layers"]["lora"]))
    assert warm["layers"]["lora"]["q"]["b"].any() and all(equal(trainer.reference, warm))
    out = trainer.step()
    # Sampler and trainer both add the adapters: the gap is numerical.
    assert out.metrics["sampling/logp_diff_max"] < 2e-5
    assert not any(equal(trainer.states.actor.params, warm))
    assert all(equal((trainer.parts.actor_base, trainer.parts.critic_base), bases))

    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, trainer.state(), trainer.position(), block=True)
        arrays = json.loads((tmp_path / "1" / "manifest.json").read_text())["body"]["arrays"]
        named = [name for name in arrays if ".params." in name or name.startswith("reference.")]
        assert named and all(".lora." in name or name.endswith("value_head") for name in named)
        assert not any("embed" in name for name in arrays)
        again = Trainer(tiny(*ADAPTERS, MOVES))
        state, position = checkpoints.restore(None, abstract_state(again.state()))
    again.restore(state, position)
    first, second = trainer.step(), again.step()
    assert [row.token.tolist() for row in first.rollout.rows] == [row.token.tolist() for row in second.rollout.rows]
    assert all(equal(trainer.state(), again.state()))

    changed = Trainer(tiny(*ADAPTERS, MOVES))
    changed.parts.actor_base["norm"] = changed.parts.actor_base["norm"].at[3].add(1e-3)
    with pytest.raises(DataError, match="resume: the checkpoint was written with frozen weights of model "):
        changed.restore(state, position)


def test_a_whole_critic_is_cut_from_the_actor_with_its_adapters_merged() -> None:
    trainer = Trainer(tiny("model.lora.rank=4", "model.base_dtype=bfloat16", "warm_start.steps=2"))
    trainer.warm_start()
    lora, critic = trainer.config.model.lora, trainer.states.critic
    assert lora is not None and critic is not None and not trainer.parts.critic_base
    merged = merge(trainer.policy(), lora, "float32")
    assert all(equal(critic.params["trunk"]["layers"], merged["layers"]))
    assert {x.dtype for x in jax.tree.leaves(trainer.parts.actor_base)} == {jnp.dtype("bfloat16")}


def test_a_critic_with_adapters_of_its_own_has_the_actor_s_frozen_trunk() -> None:
    trainer = Trainer(tiny("model.lora.rank=4", "critic.lora.rank=2", "critic.count=2", "warm_start.steps=2"))
    trainer.warm_start()
    actor, critic = trainer.parts.actor_base, trainer.parts.critic_base
    assert all(equal(critic["trunk"]["layers"], actor["layers"]))
    state = trainer.states.critic
    assert state is not None and state.params["trunk"]["layers"]["lora"]["q"]["a"].shape == (2, 1, 32, 2)
    assert not state.params["trunk"]["layers"]["lora"]["q"]["b"].any()


def test_an_actor_without_adapters_may_have_a_critic_with_them() -> None:
    """Its frozen trunk is the actor as it was loaded, which a resumed run loads again; a warm one would be nowhere."""
    trainer = Trainer(tiny("critic.lora.rank=2", "warm_start.steps=1"))
    assert not trainer.parts.actor_base and set(trainer.states.critic.params["trunk"]) == {"layers"}  # type: ignore[union-attr]
    loaded = copy(trainer.policy())
    identity = trainer.position()
    trainer.warm_start()
    trunk = trainer.parts.critic_base["trunk"]
    assert all(equal(trunk["layers"], loaded["layers"])) and not any(equal(trunk["layers"], trainer.policy()["layers"]))
    assert trainer.position() == identity
