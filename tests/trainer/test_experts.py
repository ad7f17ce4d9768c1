"""Training steps of a model with experts: on one device and spread over a mesh, with the sampler's choices replayed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from helpers import SPEC
from ppojax.config import Config
from ppojax.errors import ConfigError
from ppojax.trainer import Trainer
from tiny_config import TINY, tiny

EXPERTS = ("model.fresh.moe.experts=8", "model.fresh.moe.chosen=2", "model.fresh.moe.ffn=16", "warm_start=null")


@pytest.mark.parametrize(
    "arguments",
    [
        ("mesh.data=2", "mesh.expert=2", "update.shared_prefix=false", "actor.router.balance=0.01"),
        pytest.param(("rollout.record_experts=false", "critic.count=2"), marks=pytest.mark.slow),
        pytest.param(("model.dtype=bfloat16", "mesh.expert=2", "mesh.tensor=2"), marks=pytest.mark.slow),
    ],
)
def test_steps(arguments: tuple[str, ...]) -> None:
    trainer = Trainer(tiny(*EXPERTS, *arguments))
    out = trainer.step()
    m = out.metrics
    assert all(np.isfinite(value) for value in m.values())
    assert {"moe/load_max", "moe/load_entropy", "moe/dead_frac", "moe/balance_loss", "moe/z_loss"} <= m.keys()
    assert m["moe/load_max"] >= 1 and 0 < m["moe/load_entropy"] <= 1
    recorded = "rollout.record_experts=false" not in arguments
    routed_BTLK = out.batch.experience.routed_BTLK
    assert (routed_BTLK is not None) == recorded
    if "model.dtype=bfloat16" not in arguments:
        assert m["sampling/logp_diff_max"] < 5e-5
    # The first minibatch sees the sampler's weights, the second moved ones, whose router may choose otherwise.
    assert m["moe/free_choice_frac"] > 0.9 if recorded else m["moe/free_choice_frac"] == 1


def test_experts_that_do_not_divide_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(*EXPERTS, "mesh.expert=3", "update.microbatch_rows=12", "rollout.prompts=12", "update.minibatches=1")
    assert "moe.experts is split over mesh.expert and does not divide; mesh.expert may be 1, 2, 4, 8" in str(
        caught.value
    )


def test_experts_of_a_loaded_dense_model_are_refused_before_its_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is to be replayed can only be told when the model is known."""
    dense = SimpleNamespace(spec=SPEC)  # and no weights
    monkeypatch.setattr("ppojax.models.pretrained.find_source", lambda path: dense)
    own = [a for a in TINY if not a.startswith("model.")]
    config = Config.load(*own, "model.path=dense", "rollout.record_experts=true")
    with pytest.raises(ConfigError) as caught:
        Trainer(config)
    assert str(caught.value) == (
        "rollout.record_experts=true: this model has no experts to record; set rollout.record_experts=null"
    )
