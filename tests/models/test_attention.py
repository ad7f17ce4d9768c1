"""Who sees whom, in each way that tokens lie; and the gradients of what a score may go through."""

from __future__ import annotations

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from decoder_by_hand import SPECS, drawn
from ppojax.mesh import MeshConfig, shard_rows
from ppojax.models.activation import gated
from ppojax.models.attention import Packing, Scores, attend, masks
from ppojax.models.forward import ModelDef, hidden_states, param_shardings, positions
from ppojax.rollout.sampler import SamplerDef, empty, extend, prefill

TOKEN_BT = jnp.asarray(np.random.default_rng(0).integers(1, 32, (4, 12)), jnp.int32)
hidden = jax.jit(hidden_states, static_argnames=("model", "packing"))


def model_of(name: str) -> ModelDef:
    return ModelDef(SPECS[name], remat="none")


@lru_cache
def whole(name: str) -> np.ndarray:
    """Hidden states of whole rows, read at once."""
    return np.asarray(hidden(model_of(name), drawn(SPECS[name]), TOKEN_BT, positions(TOKEN_BT)).hidden_BTD)


def same(got: jax.Array, want: np.ndarray) -> None:
    # The same sums in another order, through three blocks.
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("slots", [0, 7])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_masks_say_what_they_should(slots: int, window: int | None) -> None:
    start_B = np.array([2, 6]) if slots else np.array([0, 5])
    position_BT = start_B[:, None] + np.arange(4)
    (got_BTS,) = masks(jnp.asarray(position_BT, jnp.int32), slots, None, window)
    assert got_BTS.shape == (2, 4, slots + 4)
    for b, t, s in np.ndindex(got_BTS.shape):
        position = position_BT[b, t]
        other = s if s < slots else position_BT[b, s - slots]
        written = s >= slots or s < start_B[b]
        near = window is None or position - other < window
        assert bool(got_BTS[b, t, s]) == (written and other <= position and near), (b, t, s)


# Other tests run the Llama form, with the sampler and with a shared prefix.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("llama", "nope") else ()) for n in SPECS]
)
def test_prefill_extend_and_decode_are_the_whole_forward(name: str) -> None:
    """Rows of several lengths; the cache outgrows every window."""
    p, want_BTD, rows = drawn(SPECS[name]), whole(name), np.arange(4)
    sampler = SamplerDef(model_of(name), MeshConfig().build(), positions=14, turn_tokens=1)
    length = np.array([3, 6, 2, 5])
    every, slots = jnp.arange(4, dtype=jnp.int32), empty(p, sampler=sampler, count=4)
    slots = prefill(p, slots, TOKEN_BT[:, :6], jnp.asarray(length, jnp.int32), every, sampler=sampler)
    same(slots.hidden_BD, want_BTD[rows, length - 1])
    for count in ([4, 0, 3, 2], [1, 1, 1, 1], [1, 1, 1, 1]):
        place = np.minimum(length[:, None] + np.arange(max(count))[None], 11)
        new_BT = jnp.take_along_axis(TOKEN_BT, jnp.asarray(place, jnp.int32), axis=1)
        slots = extend(p, slots, new_BT, jnp.asarray(count, jnp.int32), every, sampler=sampler, whole=True)
        length = length + count
        same(slots.hidden_BD, want_BTD[rows, length - 1])
        np.testing.assert_array_equal(slots.length_B, length)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "llama" else ()) for n in SPECS])
def test_packed_rows_are_separate_rows(name: str) -> None:
    """Two prompts of 3 and 5 tokens in 6 places, two responses of 5 tokens to each."""
    p, prefix, R = drawn(SPECS[name]), 6, 5
    prompt_PT, length_P = np.asarray(TOKEN_BT[:2, :6]), (3, 5)
    response_PGR = np.random.default_rng(1).integers(1, 32, (2, 2, R))
    row_BT = np.ones((4, 12), np.int32)
    position_PN = np.tile(np.arange(prefix + 2 * R), (2, 1))
    for i in range(4):
        at, n = i // 2, length_P[i // 2]
        row_BT[i, :n], row_BT[i, n : n + R] = prompt_PT[at, :n], response_PGR[at, i % 2]
        position_PN[at, prefix + i % 2 * R :][:R] = n + np.arange(R)
    packed_PN = np.concatenate([prompt_PT, response_PGR.reshape(2, -1)], axis=1)
    args = (jnp.asarray(packed_PN, jnp.int32), jnp.asarray(position_PN, jnp.int32))
    got_PND = hidden(model_of(name), p, *args, packing=Packing(prefix, 2)).hidden_BTD
    want_BTD = hidden(model_of(name), p, jnp.asarray(row_BT), positions(jnp.asarray(row_BT))).hidden_BTD
    for i in range(4):
        at, n = i // 2, length_P[i // 2]
        same(got_PND[at, :n], want_BTD[i, :n])
        same(got_PND[at, prefix + i % 2 * R :][:R], want_BTD[i, n : n + R])


MESHES = {
    "tensor 4": MeshConfig(tensor=4),
    "fsdp 4": MeshConfig(fsdp=4),
    "fsdp 2, tensor 2": MeshConfig(fsdp=2, tensor=2),
}
FAST = {("llama", "tensor 4"), ("gemma", "fsdp 2, tensor 2"), ("gpt-oss", "tensor 4"), ("nope", "fsdp 4"),
        ("latent", "tensor 4")}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=() if (name, mesh) in FAST else pytest.mark.slow)
        for name in SPECS
        for mesh, config in MESHES.items()
        if not config.check_divides(SPECS[name].axis_sizes())
    ],
)
def test_meshes_give_the_hidden_states_of_one_device(name: str, mesh: str) -> None:
    built, model = MESHES[mesh].build(), model_of(name)
    p = jax.device_put(drawn(SPECS[name]), param_shardings(model, built))
    weight = p["layers"]["o"]
    assert len({str(shard.index) for shard in weight.addressable_shards}) == 4
    token_BT = shard_rows(TOKEN_BT, built)
    same(hidden(model, p, token_BT, positions(token_BT)).hidden_BTD, whole(name))


@pytest.mark.parametrize("how", ["softcap", "sink", "both"])
def test_gradients_of_attention(how: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v, old = (jnp.asarray(rng.normal(size=(1, 3, heads, 2)), jnp.float32) for heads in (4, 2, 2, 2))
    sink_H = jnp.asarray(rng.normal(size=4), jnp.float32)
    (mask,) = masks(jnp.asarray([[3, 4, 5]], jnp.int32), 3, None, 4)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, sink_H: jax.Array) -> jax.Array:
        # Finite differences hand in numpy arrays.
        q, k, v, sink_H = map(jnp.asarray, (q, k, v, sink_H))
        scores = Scores(0.7, 1.3 if how in ("softcap", "both") else None, sink_H if how in ("sink", "both") else None)
        return jnp.sum(jnp.sin(3 * attend(q, [old, k], [old, v], mask, scores)))

    check_grads(jax.jit(total), (q, k, v, sink_H), order=1, modes=["rev"], eps=1e-2, atol=5e-3, rtol=5e-3)
    moved = np.abs(jax.jit(jax.grad(total, 3))(q, k, v, sink_H)).max()
    assert (moved > 0.01) == (how in ("sink", "both"))


def test_a_sink_takes_its_share() -> None:
    """One key with score 0 and a sink of log 3: a quarter of the value is left."""
    q = k = jnp.zeros((1, 1, 1, 2))
    out = attend(
        q, [k], [jnp.ones((1, 1, 1, 2))], jnp.ones((1, 1, 1), bool), Scores(1.0, None, jnp.log(jnp.full(1, 3.0)))
    )
    np.testing.assert_allclose(out, np.full((1, 1, 2), 0.25), rtol=1e-6)


def test_clipped_swiglu() -> None:
    gate, up = jnp.asarray([9.0, -9.0, 0.5]), jnp.asarray([9.0, -9.0, 0.25])
    clipped = np.array([7.0, -9.0, 0.5])
    want = clipped / (1 + np.exp(-1.702 * clipped)) * (np.array([7.0, -7.0, 0.25]) + 1)
    np.testing.assert_allclose(gated("clipped_swiglu", gate, up), want, rtol=1e-5)
    slope = jax.vmap(jax.grad(partial(gated, "clipped_swiglu"), (0, 1)))(gate, up)
    assert float(slope[0][0]) == float(slope[1][0]) == float(slope[1][1]) == 0
