"""A step with noise on what blocks read: trained beside the policy, the same however rows are cut up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from random_batch import minibatch

from helpers import ACTOR, params
from ppojax.losses import DPPO
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef
from ppojax.models.perturb import NAME, Perturb
from ppojax.models.spec import MoESpec
from ppojax.update.actor import actor_step
from ppojax.update.settings import ActorConfig, OptimizerConfig
from ppojax.update.state import init_state

OPTIMIZER = OptimizerConfig(learning_rate=1.0, eps=1.0, max_grad_norm=1e6)
PERTURB = Perturb(initial=0.05, learning_rate=0.1)


def moves(
    rows: int,
    mesh: MeshConfig | None = None,
    model: ModelDef = ACTOR,
    key: int = 7,
    optimizer: OptimizerConfig = OPTIMIZER,
    perturb: Perturb | None = PERTURB,
) -> tuple[Any, dict[str, float]]:
    """What one step makes of the parameters, and its metrics; prompts are shared."""
    built, config = (mesh or MeshConfig()).build(), ActorConfig(optimizer=optimizer, perturb=perturb)
    batch, layout = minibatch(mesh, share=True)
    model = replace(model, mesh=built)
    start = params(model) | ({} if perturb is None else {NAME: perturb.start(model.spec)})
    state, metrics, _ = actor_step(
        init_state(model, start, config.build_optimizer(), built), batch, model=model, loss=DPPO(), optimizer=optimizer,
        temperature=1.0, layout=layout, microbatch_rows=rows, mesh=built, perturb=perturb,
        noise_key=None if perturb is None else jax.random.key(key),
    )  # fmt: skip
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


def assert_close(got: Any, want: Any) -> None:
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * largest)


def test_deviations_are_trained_and_microbatches_change_nothing() -> None:
    want, metrics = moves(8)
    got, cut = moves(2)
    assert_close(got, want)
    assert cut == pytest.approx(metrics, rel=2e-5, abs=1e-6)
    assert want[NAME].dtype == np.float32 and np.abs(want[NAME] - np.log(0.05)).min() > 1e-7
    sigma = np.exp(want[NAME])
    assert [metrics[f"actor/sigma_{x}"] for x in ("min", "mean", "max")] == pytest.approx(
        [sigma.min(), sigma.mean(), sigma.max()], rel=1e-6
    )


@pytest.mark.slow
def test_the_noise_follows_the_key_and_not_the_mesh() -> None:
    want, _ = moves(8)
    assert_close(moves(4, MeshConfig(fsdp=2, tensor=2))[0], want)
    assert not np.allclose(moves(8, key=8)[0][NAME], want[NAME], rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_what_is_computed_again_has_the_same_noise(remat: Any) -> None:
    assert_close(moves(8, model=replace(ACTOR, remat=remat))[0], moves(8)[0])


@pytest.mark.slow
def test_deviations_do_not_decay_and_clip_no_one() -> None:
    """With a learning rate of 0 they stay, whatever the decay; the weights move as with noise that is not trained."""
    decaying = OptimizerConfig(learning_rate=1e-3, weight_decay=0.5)
    got, _ = moves(8, optimizer=decaying, perturb=PERTURB.model_copy(update={"learning_rate": 0.0}))
    np.testing.assert_array_equal(got[NAME], np.full(2, np.log(np.float32(0.05))))
    trained, _ = moves(8, optimizer=decaying)
    assert not np.array_equal(trained.pop(NAME), got.pop(NAME))
    jax.tree.map(np.testing.assert_array_equal, got, trained)


@pytest.mark.slow
def test_experts_read_noise_too() -> None:
    moe = MoESpec(experts=4, chosen=2, ffn=16, dense_first=1)
    model = replace(ACTOR, spec=ACTOR.spec.model_copy(update={"moe": moe}))
    want, _ = moves(8, model=model)
    assert_close(moves(4, model=model)[0], want)
    assert np.abs(want[NAME] - np.log(0.05)).min() > 1e-7
    off, _ = moves(8, model=model, perturb=None)
    assert NAME not in off and not np.allclose(off["embed"], want["embed"], rtol=0, atol=1e-6)
