"""Decoders with experts: one device or a mesh, cached or whole, kept or computed again, the numbers are the same."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_model import SPECS, drawn
from ppojax.mesh import MeshConfig
from ppojax.models.attention import as_cache
from ppojax.models.decoder import Hidden
from ppojax.models.forward import ModelDef, head_VD, hidden_states, param_shardings, positions
from ppojax.models.spec import Remat

TOKEN_BT = jnp.asarray(np.random.default_rng(0).integers(0, 48, (8, 7)), jnp.int32)
FAMILIES = pytest.mark.parametrize("family", SPECS)
MESHES = {
    "tensor": MeshConfig(tensor=2),
    "fsdp": MeshConfig(fsdp=4),
    "expert": MeshConfig(expert=4),
    "all": MeshConfig(fsdp=2, expert=2, tensor=2),
}
FAST = {("expert", "gpt_oss")}


@lru_cache
def logits_and_gradient(family: str, mesh: MeshConfig | None, remat: Remat = "none") -> Any:
    """Logits, routing, and the gradient of a smooth scalar of the logits."""
    built = None if mesh is None else mesh.build()
    model = replace(ModelDef(SPECS[family], remat=remat), mesh=built)
    params = drawn(model.spec)
    if built is not None:
        params = jax.device_put(params, param_shardings(model, built))

    def scalar(p: Any) -> tuple[jax.Array, Any]:
        hidden = hidden_states(model, p, TOKEN_BT, positions(TOKEN_BT))
        logits_BTV = hidden.hidden_BTD @ head_VD(p).T
        return jnp.sum(jnp.sin(logits_BTV)), (logits_BTV, hidden.routing)

    return jax.device_get(jax.jit(jax.grad(scalar, has_aux=True))(params))


def assert_same(got: Any, want: Any) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("mesh", "family"),
    [
        pytest.param(m, f, marks=() if (m, f) in FAST else pytest.mark.slow, id=f"{m}-{f}")
        for m in MESHES
        for f in SPECS
    ],
)
def test_meshes_change_nothing(mesh: str, family: str) -> None:
    assert_same(logits_and_gradient(family, MESHES[mesh]), logits_and_gradient(family, None))


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_computing_again_changes_nothing(remat: Remat) -> None:
    assert_same(logits_and_gradient("deepseek_v3", None, remat), logits_and_gradient("deepseek_v3", None))


@FAMILIES
def test_every_parameter_but_the_bias_of_the_choice_learns(family: str) -> None:
    gradient, (_, routing) = logits_and_gradient(family, None)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert (np.abs(g).max() > 0) != ("choice_bias" in name), name
    spec = SPECS[family]
    assert spec.moe is not None
    assert routing.expert_NK.shape == (spec.moe_layers, *TOKEN_BT.shape, spec.moe.chosen)
    assert routing.load_E.shape == (spec.moe_layers, spec.moe.experts)
    np.testing.assert_array_equal(routing.load_E.sum(-1), TOKEN_BT.size * spec.moe.chosen)


@FAMILIES
def test_a_cache_gives_the_full_pass_and_its_routing(family: str) -> None:
    model, params = ModelDef(SPECS[family]), drawn(SPECS[family])
    run = jax.jit(lambda t, p, c: hidden_states(model, params, t, p, c))
    whole: Hidden = run(TOKEN_BT, positions(TOKEN_BT), None)
    first = run(TOKEN_BT[:, :6], positions(TOKEN_BT)[:, :6], None)
    cache = as_cache(first.key_value)
    last = run(TOKEN_BT[:, 6:], positions(TOKEN_BT)[:, 6:], cache)
    np.testing.assert_allclose(last.hidden_BTD[:, 0], whole.hidden_BTD[:, 6], rtol=1e-4, atol=1e-5)
    assert last.routing is not None and whole.routing is not None
    np.testing.assert_array_equal(last.routing.expert_NK[:, :, 0], whole.routing.expert_NK[:, :, 6])


def test_routers_stay_in_float32() -> None:
    """In a bfloat16 model a router's float32 matrix is not rounded: moving it by less than half a bit is seen."""
    model, params = ModelDef(SPECS["qwen3_moe"], "bfloat16"), drawn(SPECS["qwen3_moe"])
    run = jax.jit(lambda p: hidden_states(model, p, TOKEN_BT, positions(TOKEN_BT)).routing.z)
    router = params["layers"]["router"]
    nudged = {**params, "layers": {**params["layers"], "router": router * (1 + 2**-11)}}
    assert not np.array_equal(run(params), run(nudged))


def test_padding_is_no_load() -> None:
    model, params = ModelDef(SPECS["gpt_oss"]), drawn(SPECS["gpt_oss"])
    valid_BT = positions(TOKEN_BT) < 3
    run = jax.jit(lambda v: hidden_states(model, params, TOKEN_BT, positions(TOKEN_BT), valid_BT=v).routing)
    routing = run(valid_BT)
    assert routing is not None
    np.testing.assert_array_equal(routing.tokens, [24, 24])
    for layer in range(2):
        chosen = np.asarray(routing.expert_NK)[layer][np.asarray(valid_BT)]
        np.testing.assert_array_equal(routing.load_E[layer], np.bincount(chosen.ravel(), minlength=8))
