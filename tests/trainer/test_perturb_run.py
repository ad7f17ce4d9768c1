"""A run with noise in its updates: what has the deviations and what has not."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from ppojax.errors import DataError
from ppojax.models.perturb import NAME
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.settings import CheckpointConfig
from ppojax.trainer import Trainer
from ppojax.update.state import abstract_state
from tiny_config import tiny

ARGUMENTS = ("actor.perturb.initial=0.05", "actor.perturb.learning_rate=0.1", "loss.type=dppo", "rollout.group_size=4")
SAME = (
    *ARGUMENTS,
    "loss.kl.coefficient=0.1",
    "rollout.mismatch.stale_steps=1",
)


@pytest.fixture(autouse=True)
def promotion_that_optax_needs():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
def test_only_the_update_and_checkpoints_have_deviations(tmp_path: Path) -> None:
    trainer = Trainer(tiny(*SAME))
    trainer.warm_start()
    assert trainer.states.actor.params[NAME].shape == (1,)
    np.testing.assert_allclose(trainer.states.actor.params[NAME], np.log(0.05), rtol=1e-6)
    metrics = trainer.step().metrics
    moved = jax.device_get(trainer.states.actor.params[NAME])
    assert metrics["actor/sigma_max"] == pytest.approx(float(np.exp(moved[0])), rel=0.2)
    assert abs(float(moved[0]) - np.log(0.05)) > 0.01
    assert trainer.reference is not None
    for weights in (trainer.policy(), trainer.sampler_policy(), trainer.merged_policy(), trainer.reference):
        assert NAME not in weights and "embed" in weights
    assert all(NAME not in older for older in trainer.older)

    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, trainer.state(), trainer.position(), block=True)
        again, off = (Trainer(tiny(*arguments)) for arguments in (SAME, SAME[2:]))
        state, position = checkpoints.restore(None, abstract_state(again.state()))
        with pytest.raises(DataError, match="resume with the settings of the run that wrote it"):
            checkpoints.restore(None, abstract_state(off.state()))
    again.restore(state, position)
    trainer.step()
    again.step()
    jax.tree.map(np.testing.assert_array_equal, trainer.state(), again.state())
