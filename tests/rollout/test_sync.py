"""What the sampler reads: the trainer's own arrays where they fit, else cast and resharded ones."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import SPEC
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef, init, param_shardings
from ppojax.models.spec import MoESpec
from ppojax.rollout.sync import sampler_params
from ppojax.runtime.compiling import compile_metrics
from tiny_model import MODEL, collector_of, random_policy, scripted_task

TRAINER, SAMPLER = MeshConfig(fsdp=4), MeshConfig(data=2, tensor=2)
TASKS = [scripted_task(p, ("e2", 0.0), ("done", 1.0)) for p in ("a?", "bc?", "d")]


def placed(model: ModelDef, mesh: jax.sharding.Mesh) -> dict:
    return jax.device_put(init(model, jax.random.key(0)), param_shardings(model, mesh))


def test_what_fits_is_handed_through() -> None:
    mesh = TRAINER.build()
    params = placed(MODEL, mesh)
    assert sampler_params(params, replace(MODEL, mesh=mesh)) is params
    # Another mesh on which everything lies where it lies: nothing moves either.
    assert sampler_params(params, replace(MODEL, mesh=MeshConfig(fsdp=4).rearrange(mesh))) is params


def test_weights_are_cast_and_routers_are_not() -> None:
    model = ModelDef(SPEC.model_copy(update={"moe": MoESpec(experts=4, chosen=2, ffn=16)}))
    mesh = MeshConfig().build()
    params = placed(model, mesh)
    got = sampler_params(params, replace(model, dtype="bfloat16", mesh=mesh))
    assert got["layers"]["router"] is params["layers"]["router"]
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(params), strict=True):
        if path[-1].key != "router":
            assert new.dtype == jnp.bfloat16 and jnp.array_equal(new, old.astype(jnp.bfloat16)), path
    # What is kept in a narrower type stays as it is: it is cast where it is read.
    assert sampler_params(got, replace(model, mesh=mesh)) is got


def test_another_mesh_plays_the_same_episodes() -> None:
    """Token for token, from weights that lie as the sampler's mesh wants them; the second sync compiles nothing."""
    mesh = TRAINER.build()
    other = SAMPLER.rearrange(mesh)
    model = replace(MODEL, mesh=other)
    for seed in (0, 1):
        params = jax.device_put(random_policy(seed), param_shardings(MODEL, mesh))
        compiled = compile_metrics()["compile/count"]
        got = jax.block_until_ready(sampler_params(params, model))
        assert seed == 0 or compile_metrics()["compile/count"] == compiled
        for new, old, wanted in zip(
            jax.tree.leaves(got), jax.tree.leaves(params), jax.tree.leaves(param_shardings(MODEL, other)), strict=True
        ):
            assert new.sharding.is_equivalent_to(wanted, new.ndim)
            np.testing.assert_array_equal(new, old)
    key = jax.random.key(3)
    alone = collector_of()(random_policy(1), TASKS, key).rows
    spread = collector_of(mesh=other, slots=8)
    rows = replace(spread, sampler=replace(spread.sampler, model=model))(got, TASKS, key).rows
    for a, b in zip(alone, rows, strict=True):
        assert a.token.tolist() == b.token.tolist() and a.action.tolist() == b.action.tolist()
        # The bound of the plain sampler in float32: sums in another order, of log-probabilities of order 5.
        np.testing.assert_allclose(a.logp_behavior, b.logp_behavior, rtol=0, atol=1e-5)


def test_weights_go_to_other_devices() -> None:
    """Beside the trainer's four: as many in another layout, and fewer."""
    params = placed(MODEL, TRAINER.build())
    for other in (SAMPLER, MeshConfig(tensor=2)):
        mesh = other.build(after=4)
        assert {device.id for device in mesh.devices.flat} == set(range(4, 4 + other.size))
        model = replace(MODEL, dtype="bfloat16", mesh=mesh)
        got = sampler_params(params, model)
        for new, old, wanted in zip(
            jax.tree.leaves(got), jax.tree.leaves(params), jax.tree.leaves(param_shardings(MODEL, mesh)), strict=True
        ):
            assert new.sharding.is_equivalent_to(wanted, new.ndim)
            np.testing.assert_array_equal(new, np.asarray(old).astype(jnp.bfloat16))
        assert sampler_params(got, model) is got


@pytest.mark.slow
def test_casting_once_is_casting_in_every_call() -> None:
    """To the bit: decoding reads the same numbers."""
    low, params, key = replace(MODEL, dtype="bfloat16"), random_policy(2), jax.random.key(0)
    mesh = MeshConfig().build()
    plain = collector_of(mesh=mesh)
    play = replace(plain, sampler=replace(plain.sampler, model=replace(low, mesh=mesh)))
    want = play(params, TASKS, key).rows
    got = play(sampler_params(params, play.sampler.model), TASKS, key).rows
    for a, b in zip(want, got, strict=True):
        assert a.token.tolist() == b.token.tolist()
        np.testing.assert_array_equal(a.logp_behavior, b.logp_behavior)
