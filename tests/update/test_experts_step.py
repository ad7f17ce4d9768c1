"""The actor's step of a model with experts: replayed, balanced, and the same on every mesh."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest
from random_batch import meshes_of, minibatch, minibatch_rows

from moe_model import SPECS, drawn
from ppojax.losses import DPPO
from ppojax.losses.router import RouterLoss
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef
from ppojax.models.value_head import LinearHead
from ppojax.types import Row
from ppojax.update.actor import actor_step
from ppojax.update.critic import critic_step
from ppojax.update.settings import CriticConfig, OptimizerConfig
from ppojax.update.state import init_state

# DeepSeek's experts under plain attention, one block: it is the step that is looked at.
SPEC = SPECS["qwen3_moe"].model_copy(
    update={"layers": 1, "kv_heads": 4, "moe": SPECS["deepseek_v3"].moe.model_copy(update={"dense_first": 0})}
)
OPTIMIZER = OptimizerConfig(learning_rate=1.0, eps=1.0, max_grad_norm=1e6)
CRITIC_CONFIG = CriticConfig(optimizer=OPTIMIZER)
BALANCED = RouterLoss(balance=0.1, z=0.01)


def recorded_rows() -> list[Row]:
    """Rows with experts drawn at random, distinct for each token and layer; those of a prompt are its group's."""
    rows = []
    for row in minibatch_rows():
        rng = np.random.default_rng(row.group)
        routed = rng.random((len(row.token) + 40, SPEC.moe_layers, 8)).argsort(-1)[: len(row.token), :, :2]
        rows.append(replace(row, routed=routed.astype(np.int16)))
    return rows


def step(
    mesh: MeshConfig | None,
    *,
    share: bool = False,
    replay: bool = True,
    rows: int = 8,
    router: RouterLoss = BALANCED,
    critic: bool = False,
) -> tuple[Any, dict[str, float]]:
    """What one step moves each parameter by, and its metrics: of the policy, or of a critic of the same shape."""
    built = (mesh or MeshConfig()).build()
    batch, layout = minibatch(mesh, share, rows=recorded_rows() if replay else minibatch_rows())
    how = {"layout": layout, "microbatch_rows": rows, "mesh": built}
    if critic:
        model = ModelDef(SPEC, mesh=built, head=LinearHead())
        start = {"trunk": drawn(SPEC), "value_head": jax.random.normal(jax.random.key(9), (SPEC.width + 1, 1))}
        given = init_state(model, start, CRITIC_CONFIG.build_optimizer(), built)
        state, metrics = critic_step(given, batch, model=model, config=CRITIC_CONFIG, **how)
    else:
        model, start = ModelDef(SPEC, mesh=built), drawn(SPEC)
        given = init_state(model, start, OPTIMIZER.build(), built)
        state, metrics, _ = actor_step(
            given, batch, model=model, loss=DPPO(), optimizer=OPTIMIZER, temperature=1.0, router=router, **how
        )
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, start)
    return moved, {name: float(value) for name, value in metrics.items()}


@lru_cache
def reference(critic: bool = False) -> tuple[Any, dict[str, float]]:
    return step(None, critic=critic)


def assert_same(got: tuple[Any, dict[str, float]], want: tuple[Any, dict[str, float]]) -> None:
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want[0]))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got[0]), jax.tree.leaves(want[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-5 * largest, err_msg=jax.tree_util.keystr(path))
    assert got[1] == pytest.approx(want[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("mesh", "critic"),
    [
        pytest.param(
            *(m, critic),
            id=f"{name}-{'critic' if critic else 'actor'}",
            marks=() if name == "1x2x2x2" and not critic else pytest.mark.slow,
        )
        for name, m in meshes_of(8, tensor=4).items()
        for critic in (False, True)
    ],
)
def test_meshes_change_nothing(mesh: MeshConfig, critic: bool) -> None:
    """Also the losses and metrics of the router, which are of all devices together."""
    assert_same(step(mesh, critic=critic), reference(critic))


@pytest.mark.slow
def test_choices_that_are_not_the_routers_own_are_replayed() -> None:
    _, replayed = reference()
    assert replayed["moe/free_choice_frac"] < 0.6
    assert replayed["moe/dead_frac"] == 0 and 1 <= replayed["moe/load_max"] < 4


@pytest.mark.slow
def test_free_choices_and_microbatches() -> None:
    """Without router losses a step with experts depends on microbatches and shared prompts no more than a dense one."""
    free = step(None, replay=False, router=RouterLoss())
    assert free[1]["moe/free_choice_frac"] == 1
    cut = step(None, replay=False, router=RouterLoss(), rows=2, share=True)
    load = {name for name in free[1] if name.startswith("moe/")}
    kept = [{n: v for n, v in m.items() if n not in load} for _, m in (cut, free)]
    assert_same((cut[0], kept[0]), (free[0], kept[1]))


def test_the_bias_of_the_choice_stays_where_it_is() -> None:
    moved, _ = reference()
    assert not moved["layers"]["choice_bias"].any() and np.abs(moved["layers"]["router"]).max() > 0
