"""Experts over a mesh: the outputs and gradients of one device, whatever the mesh and however tokens travel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_layer import SPECS, hidden, layer_of
from ppojax.mesh import MeshConfig, sharding
from ppojax.models.exchange import over_mesh
from ppojax.models.experts import EXPERT_WEIGHTS
from ppojax.models.moe import mix

MESHES = {
    "expert 2": MeshConfig(expert=2),
    "expert 4": MeshConfig(expert=4),
    "expert 8": MeshConfig(expert=8),
    "data x expert": MeshConfig(data=2, expert=2),
    "fsdp x expert": MeshConfig(fsdp=2, expert=4),
    "expert x tensor": MeshConfig(expert=4, tensor=2),
    "data x tensor": MeshConfig(data=2, tensor=2),
    "all": MeshConfig(data=2, expert=2, tensor=2),
}
FAST = {("expert 4", "softmax"), ("all", "chosen")}
CASES = [
    pytest.param(m, s, id=f"{m}-{s}", marks=() if (m, s) in FAST else pytest.mark.slow) for m in MESHES for s in SPECS
]


def placed(weights: dict[str, jax.Array], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Experts where the mesh wants them, the router everywhere."""
    return {n: jax.device_put(w, sharding(mesh, EXPERT_WEIGHTS.get(n, ()))) for n, w in weights.items()}


def both(mesh: jax.sharding.Mesh | None, name: str, x_ND: jax.Array, weights: dict[str, jax.Array]) -> Any:
    spec, activation = SPECS[name]

    def loss(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y, routing = mix(x, w, spec, activation, mesh=mesh)
        return jnp.sum(jnp.sin(y)) + routing.z, y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x_ND, weights)


def assert_same(got: Any, want: Any) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max(), err_msg=str(path))


@pytest.mark.parametrize(("mesh_name", "name"), CASES)
def test_a_mesh_gives_what_one_device_gives(mesh_name: str, name: str) -> None:
    """Also where rows do not divide: 21 rows are filled up to an even split."""
    mesh = MESHES[mesh_name].build()
    x_ND, weights = hidden(21), layer_of(SPECS[name][0])
    assert_same(both(mesh, name, x_ND, placed(weights, mesh)), both(None, name, x_ND, weights))


def test_nothing_is_dropped_when_every_token_wants_the_same_experts() -> None:
    mesh = MeshConfig(expert=4).build()
    x_ND, weights = jnp.abs(hidden(16)), layer_of(SPECS["softmax"][0])
    weights["router"] = weights["router"].at[:, 6:].set(3.0)  # both on the last device
    want = both(None, "softmax", x_ND, weights)
    _, routing = jax.jit(lambda x, w: mix(x, w, *SPECS["softmax"]))(x_ND, weights)
    assert set(np.unique(routing.expert_NK)) == {6, 7}
    assert_same(both(mesh, "softmax", x_ND, placed(weights, mesh)), want)


def emulated(
    operand: jax.Array,
    output: jax.Array,
    start: jax.Array,
    size: jax.Array,
    there: jax.Array,
    got: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`ragged_all_to_all` as its documentation defines it, by sending everything to everyone."""
    me = jax.lax.axis_index(axis_name)
    all_operand, all_start, all_there, all_size = (
        jax.lax.all_gather(x, axis_name) for x in (operand, start, there, size)
    )
    row = jnp.arange(operand.shape[0], dtype=jnp.int32)
    for source in range(all_operand.shape[0]):
        first, count = all_start[source, me], all_size[source, me]
        inside = (row >= first) & (row < first + count)
        place = jnp.where(inside, all_there[source, me] + row - first, output.shape[0])
        output = output.at[place].set(all_operand[source], mode="drop")
    del got
    return output


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in ("softmax", "chosen")])
def test_ragged_travel_is_the_same_travel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    (spec, activation), mesh = SPECS[name], MeshConfig(data=2, expert=4).build()
    x_ND, weights = hidden(22), layer_of(spec)
    _, routing = mix(x_ND, weights, spec, activation)
    weight_NK = jax.random.uniform(jax.random.key(5), routing.expert_NK.shape)
    own = {n: w for n, w in weights.items() if n in EXPERT_WEIGHTS}

    def run(x: jax.Array, weight: jax.Array, w: dict[str, jax.Array], transport: Any) -> jax.Array:
        y = over_mesh(x, routing.expert_NK, weight, w, activation, "blocks", mesh, transport)
        return jnp.sum(jnp.sin(y))

    got, want = (
        jax.jit(jax.value_and_grad(lambda *a, t=t: run(*a, t), (0, 1, 2)))(x_ND, weight_NK, own)
        for t in ("ragged", "padded")
    )
    assert_same(got, want)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_ragged_travel_lowers_for_accelerators(platform: str) -> None:
    (spec, activation), mesh = SPECS["softmax"], MeshConfig(expert=4, tensor=2).build()
    x_ND, weights = hidden(16), layer_of(spec)
    own = {n: w for n, w in weights.items() if n in EXPERT_WEIGHTS}
    expert_NK = jnp.zeros((16, 2), jnp.int32)

    def loss(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(over_mesh(x, expert_NK, jnp.ones((16, 2)), w, activation, "ragged", mesh, "ragged"))

    text = jax.jit(jax.grad(loss, (0, 1))).trace(x_ND, own).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("ragged_all_to_all") >= 3  # there, back, and their transposes


def test_experts_that_do_not_divide_are_refused() -> None:
    spec, activation = SPECS["softmax"]
    with pytest.raises(ValueError) as caught:
        mix(hidden(6), layer_of(spec), spec, activation, mesh=MeshConfig(expert=3).build())
    assert str(caught.value) == "8 experts do not divide over mesh.expert = 3: make mesh.expert a divisor of 8"
