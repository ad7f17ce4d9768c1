"""Where states lie: moments over data too, in the host's memory, critics on a mesh of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np
import pytest
from random_batch import minibatch

from helpers import ACTOR, CRITIC, params
from ppojax.errors import ConfigError
from ppojax.experience.minibatch import move_rows
from ppojax.experience.score import Scorers, score
from ppojax.losses import DPPO
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef, param_shardings
from ppojax.types import Experience, Layout, TrainState
from ppojax.update import offload
from ppojax.update.actor import actor_step
from ppojax.update.critic import critic_step
from ppojax.update.offload import check_host_memory, rest, wake
from ppojax.update.settings import CriticConfig, OptimizerConfig
from ppojax.update.state import init_state

OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
WIDE = ModelDef(ACTOR.spec.model_copy(update={"width": 64, "ffn": 128}))


def kinds(tree: Any) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def share_of(tree: Any) -> float:
    """Part of the numbers that the first device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)


def bytes_of(tree: Any) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def actor_state(mesh: MeshConfig, optimizer: OptimizerConfig = OPTIMIZER, model: ModelDef = ACTOR) -> TrainState:
    built = mesh.build()
    return init_state(model, params(model), optimizer.build(), built, spread=optimizer.over_data)


def stepping(mesh: MeshConfig, optimizer: OptimizerConfig = OPTIMIZER, model: ModelDef = ACTOR) -> tuple:
    """The arguments of an actor's step."""
    batch, layout = minibatch(mesh)
    how = {"loss": DPPO(), "optimizer": optimizer, "temperature": 1.0, "layout": layout, "microbatch_rows": 8}
    built = mesh.build()
    return batch, how | {"model": replace(model, mesh=built), "mesh": built}


def test_moments_over_data_make_the_same_step() -> None:
    """Each of 4 devices has a quarter of the moments and all of the parameters, before the step and after it."""
    mesh, states = MeshConfig(data=4), []
    built, (batch, layout) = mesh.build(), minibatch(mesh)
    for over_data in (False, True):
        config = CriticConfig(optimizer=OptimizerConfig(learning_rate=1e-2, over_data=over_data))
        given = init_state(CRITIC, params(CRITIC), config.build_optimizer(), built, spread=over_data)
        assert (share_of(given.opt_state) < 1) == over_data
        state, _ = critic_step(given, batch, model=CRITIC, config=config, layout=layout, microbatch_rows=8, mesh=built)
        states.append(state)
    plain, parted = states
    assert share_of(plain.opt_state) == 1 and share_of(parted.params) == 1
    # Norms and the value head, which are no matrices, and counters are whole: 129 of 11,905 numbers.
    assert 0.25 < share_of(parted.opt_state) < 0.27
    # 1e-2 m / (sqrt(v) + 1e-8), of gradients added up in another order.
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(parted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "over_data", "share"),
    [
        (MeshConfig(data=8), False, 1.0),
        (MeshConfig(data=8), True, 1 / 3 + 2 / 3 / 8),  # the moments are two thirds
        (MeshConfig(fsdp=8), False, 1 / 8),
        (MeshConfig(fsdp=4, tensor=2), False, 1 / 8),
        (MeshConfig(data=2, fsdp=4), True, 1 / 3 / 4 + 2 / 3 / 8),
    ],
)
def test_a_compiled_step_holds_its_part_of_the_state(mesh: MeshConfig, over_data: bool, share: float) -> None:
    """What the program takes in and gives back on a device is one state, which it takes over."""
    optimizer = OptimizerConfig(over_data=over_data)
    batch, how = stepping(mesh, optimizer, WIDE)
    state = actor_state(mesh, optimizer, WIDE)
    sizes = [(jax.tree_util.keystr(path), x.size) for path, x in jax.tree_util.tree_leaves_with_path(state.params)]
    # Parameters and two moments, 4 bytes each; norms are whole, as are 20 bytes of counters.
    whole, norms = (12 * sum(n for name, n in sizes if "norm" in name or not only) for only in (False, True))
    assert bytes_of(state) == share * (whole - norms) + norms + 20
    memory = actor_step.lower(state, batch, **how).compile().memory_analysis()
    assert memory.argument_size_in_bytes - bytes_of(batch) == pytest.approx(bytes_of(state), rel=0.01)
    assert memory.alias_size_in_bytes == bytes_of(state)


def test_what_rests_in_host_memory_comes_back_to_the_bit() -> None:
    mesh = MeshConfig(data=2, fsdp=2)
    state = actor_state(mesh)
    before, shardings = jax.device_get(state), jax.tree.map(lambda x: x.sharding, state)
    device = jax.devices()[0].default_memory().kind
    assert rest(state, "none") is state
    for what, parameters in (("optimizer", device), ("all", "pinned_host")):
        resting = rest(state, cast(Any, what))
        assert kinds(resting.opt_state) == {"pinned_host"} and kinds(resting.params) == {parameters}
        assert resting.params["embed"].addressable_shards[0].data.shape == (48, 16)
        back = wake(resting)
        assert jax.tree.map(lambda x: x.sharding, back) == shardings
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), before)


def test_a_platform_without_host_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_host_memory("all", "critic.offload", MeshConfig().build())
    monkeypatch.setattr(offload, "HOST", "drum")
    check_host_memory("none", "critic.offload", MeshConfig().build())
    with pytest.raises(ConfigError) as caught:
        check_host_memory("all", "critic.offload", MeshConfig().build())
    assert str(caught.value) == (
        "critic.offload=all: cpu devices reach memory of the kinds device, pinned_host, unpinned_host, expected drum; "
        "set critic.offload=none"
    )


def test_critics_on_a_mesh_of_their_own() -> None:
    """They read the actor's rows there and learn there; their values come back to the actor's mesh."""
    ours, config = MeshConfig(fsdp=2, tensor=2), CriticConfig(optimizer=OPTIMIZER)
    mesh = ours.build()
    batch, layout = minibatch(ours)
    found = []
    for other in (ours, MeshConfig(data=4)):
        critic = replace(CRITIC, mesh=other.rearrange(mesh))
        state = init_state(critic, params(CRITIC), config.build_optimizer(), critic.mesh)
        e = scored(batch.experience, critic, state, mesh, layout)
        assert e.value_MBT is not None and len(e.value_MBT.sharding.device_set) == 4
        rows = batch if critic.mesh == mesh else move_rows(batch, mesh=critic.mesh)
        assert rows.advantage_BT.addressable_shards[0].data.shape[0] == 8 // other.row_shards
        state, metrics = critic_step(
            state, rows, model=critic, config=config, layout=layout, microbatch_rows=4, mesh=critic.mesh
        )
        wanted = param_shardings(critic, critic.mesh)
        assert all(
            x.sharding.is_equivalent_to(s, x.ndim)
            for x, s in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted), strict=True)
        )
        found.append(jax.device_get((e.value_MBT, state.params, metrics)))
    assert np.abs(found[0][0]).max() > 0.1
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def scored(
    experience: Experience, critic: ModelDef, state: TrainState, mesh: jax.sharding.Mesh, layout: Layout
) -> Experience:
    """Fill in the values alone."""
    return score(
        Scorers(critic=state.params), experience, actor=replace(ACTOR, mesh=mesh), critic=critic, layout=layout,
        temperature=1.0, microbatch_rows=4,
    )  # fmt: skip
