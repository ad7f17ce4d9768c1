"""Adapters: nothing at the start, a sum of matrices later; what is trained and what is frozen."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from helpers import ACTOR, SPEC, params
from ppojax.errors import ConfigError
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef, hidden_states, init, param_shardings, positions
from ppojax.models.lora import LoRAConfig, combine, drop, fingerprint, merge, row_keys, split
from ppojax.models.parameters import check_targets
from ppojax.models.spec import DecoderSpec, MLASpec, MoESpec

LORA = LoRAConfig(rank=3, alpha=6)
BIASED = SPEC.model_copy(update={"qkv_bias": True, "mlp_bias": True, "qk_norm": True})
LATENT = DecoderSpec(
    layers=3, width=16, heads=2, kv_heads=2, head_width=8, ffn=24, vocab=48,
    mla=MLASpec(q_rank=8, kv_rank=6, nope_width=4, rope_width=4, value_width=4),
    moe=MoESpec(experts=4, chosen=2, ffn=8, shared_ffn=8, dense_first=1),
)  # fmt: skip
SPECS = {"llama": SPEC, "biases": BIASED, "latent": LATENT}
TOKEN_BT = jax.random.randint(jax.random.key(5), (2, 7), 0, 48)


def with_lora(spec: DecoderSpec, lora: LoRAConfig = LORA, seed: int = 0, moved: bool = False) -> tuple[ModelDef, Any]:
    """A model with adapters; `moved`: ones that do something."""
    model = ModelDef(spec, lora=lora)
    drawn = init(model, jax.random.key(seed))
    if moved:
        trained, frozen = split(drawn, lora)
        leaves, tree = jax.tree.flatten(trained)
        noise = [0.3 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
        drawn = combine(frozen, jax.tree.unflatten(tree, noise))
    return model, drawn


@partial(jax.jit, static_argnames=("model",))
def hidden(model: ModelDef, p: Any) -> jax.Array:
    return hidden_states(model, p, TOKEN_BT, positions(TOKEN_BT)).hidden_BTD


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "latent" else n for n in SPECS])
def test_nothing_changes_at_the_start_bit_by_bit(name: str) -> None:
    model, drawn = with_lora(SPECS[name])
    plain = ModelDef(SPECS[name])
    base = init(plain, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, split(drawn, LORA)[1], base)
    np.testing.assert_array_equal(hidden(model, drawn), hidden(plain, base))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "latent" else n for n in SPECS])
def test_merged_weights_are_the_same_model(name: str) -> None:
    model, drawn = with_lora(SPECS[name], moved=True)
    plain = ModelDef(SPECS[name])
    merged, base = merge(drawn, LORA), split(drawn, LORA)[1]
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    got, want = hidden(model, drawn), hidden(plain, merged)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(got) - np.asarray(hidden(plain, base))).max() > 1e-2


def test_a_merge_is_made_in_float32_and_keeps_the_type() -> None:
    _, drawn = with_lora(SPEC, moved=True)
    trained, frozen = split(drawn, LORA)
    half = combine(jax.tree.map(lambda p: p.astype(jnp.bfloat16), frozen), trained)
    pair = trained["layers"]["lora"]["q"]
    want = np.asarray(half["layers"]["q"], np.float64) + 2 * np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"])
    merged = merge(half, LORA)["layers"]["q"]
    assert merged.dtype == jnp.bfloat16
    # One unit of the last of 8 bits: the float32 that was rounded lies beside the float64.
    np.testing.assert_allclose(np.asarray(merged, np.float64), want, rtol=2**-7)
    np.testing.assert_allclose(merge(half, LORA, "float32")["layers"]["q"], want, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_merged_matrices_projected() -> None:
    """L(W + s a b): dL/da = s dW b^T and dL/db = s a^T dW."""
    model, drawn = with_lora(BIASED, moved=True)
    trained, frozen = split(drawn, LORA)
    weight = jax.random.normal(jax.random.key(8), (2, 7, 32))
    by_pair = jax.grad(lambda t: jnp.sum(hidden(model, combine(frozen, t)) * weight))(trained)
    by_matrix = jax.grad(lambda p: jnp.sum(hidden(ModelDef(BIASED), p) * weight))(merge(drawn, LORA))
    for name, pair in trained["layers"]["lora"].items():
        dw, got = np.asarray(by_matrix["layers"][name], np.float64), by_pair["layers"]["lora"][name]
        want_a = 2 * dw @ np.asarray(pair["b"]).swapaxes(1, 2)
        want_b = 2 * np.asarray(pair["a"]).swapaxes(1, 2) @ dw
        np.testing.assert_allclose(got["a"], want_a, rtol=1e-4, atol=1e-4 * np.abs(want_a).max())
        np.testing.assert_allclose(got["b"], want_b, rtol=1e-4, atol=1e-4 * np.abs(want_b).max())


def test_adapters_start_as_they_should() -> None:
    """`a` has deviation 1 / sqrt(3 in), and blocks and matrices have their own; `b` is zero."""
    _, drawn = with_lora(SPEC, LoRAConfig(rank=16))
    pairs = drawn["layers"]["lora"]
    assert set(pairs) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert pairs["down"]["a"].shape == (2, 64, 16) and pairs["down"]["b"].shape == (2, 16, 32)
    for name, pair in pairs.items():
        width = pair["a"].shape[1]
        assert float(pair["a"].std()) == pytest.approx(1 / np.sqrt(3 * width), rel=0.1), name
        assert not pair["b"].any()
    assert not np.array_equal(pairs["q"]["a"], pairs["k"]["a"])
    assert not np.array_equal(pairs["q"]["a"][0], pairs["q"]["a"][1])


def test_targets_and_scales() -> None:
    _, drawn = with_lora(LATENT, LoRAConfig(rank=2, targets=("q_a", "o", "shared_up")))
    assert set(drawn["dense_layers"]["lora"]) == {"q_a", "o"}
    assert set(drawn["layers"]["lora"]) == {"q_a", "o", "shared_up"}
    assert LoRAConfig(rank=16, alpha=32).scale == 2 and LoRAConfig(rank=16, alpha=32, rslora=True).scale == 8
    with pytest.raises(ConfigError) as caught:
        check_targets(SPEC, LoRAConfig(targets=("q", "q_a", "kv_b")), "model.lora")
    assert str(caught.value) == ("model.lora.targets: this model has no q_a, kv_b; it has q, k, v, o, gate, up, down")
    check_targets(LATENT, LoRAConfig(targets=("gate", "shared_gate")), "model.lora")
    with pytest.raises(ValidationError, match="expert_up cannot have an adapter: experts and"):
        LoRAConfig.model_validate({"targets": ["q", "expert_up"]})
    with pytest.raises(ValidationError, match="'q', 'k', 'v'"):
        LoRAConfig.model_validate({"targets": ["q_proj"]})


def test_the_two_halves_are_all_there_is() -> None:
    _, drawn = with_lora(LATENT)
    trained, frozen = split(drawn, LORA)
    assert set(trained) == {"dense_layers", "layers"} and set(trained["layers"]) == {"lora"}
    assert "lora" not in frozen["layers"] and set(frozen) == {"embed", "dense_layers", "layers", "norm"}
    jax.tree.map(np.testing.assert_array_equal, combine(frozen, trained), drawn)
    assert split(drawn, None) == (drawn, {})
    half = {"trunk": drawn, "value_head": jnp.zeros(3)}
    assert set(split(half, LORA)[0]) == {"trunk", "value_head"} and set(split(half, LORA)[1]) == {"trunk"}


def test_adapters_lie_where_their_matrices_do() -> None:
    model, drawn = with_lora(SPEC, LoRAConfig(rank=4))
    placed = jax.device_put(drawn, param_shardings(model, MeshConfig(fsdp=2, tensor=2).build()))
    lora = placed["layers"]["lora"]
    shard = {f"{name}.{x}": lora[name][x].addressable_shards[0].data.shape for name in ("q", "down") for x in "ab"}
    assert shard == {"q.a": (2, 16, 4), "q.b": (2, 4, 16), "down.a": (2, 32, 4), "down.b": (2, 4, 16)}
    np.testing.assert_allclose(hidden(model, placed), hidden(model, drawn), rtol=1e-5, atol=1e-5)


def test_a_fingerprint_sees_every_bit_and_not_the_mesh() -> None:
    base = params()
    mark = fingerprint(base)
    placed = jax.device_put(base, param_shardings(ACTOR, MeshConfig(fsdp=2, tensor=2).build()))
    assert fingerprint(placed) == mark == fingerprint(jax.tree.map(jnp.array, base))
    bits = np.asarray(base["layers"]["o"]).view(np.uint32).copy()
    bits[1, 3, 5] ^= 1
    flipped = base | {"layers": base["layers"] | {"o": jnp.asarray(bits.view(np.float32))}}
    swapped = base | {"embed": base["embed"][::-1]}
    named = {("head" if name == "norm" else name): leaf for name, leaf in base.items()}
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), base)
    assert len({mark, *(fingerprint(other) for other in (flipped, swapped, named, half))}) == 5


def test_what_is_dropped_keeps_the_mean() -> None:
    """x m / (1 - r) has the mean x and the deviation |x| sqrt(r / (1 - r)): 5 of them over sqrt(400) draws."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 20))
    keys = jax.random.split(jax.random.key(1), (400, 2))
    drawn = np.asarray(jax.vmap(lambda k: drop(x, k, "q", 0.3))(keys))
    kept = drawn != 0
    np.testing.assert_allclose(drawn, np.where(kept, np.asarray(x) / 0.7, 0), rtol=1e-6)
    assert (np.abs(drawn.mean(0) - x) <= 5 * np.abs(x) * np.sqrt(0.3 / 0.7 / 400)).all()
    # Rows, tokens and features of one key, and two matrices of one row, agree as often as chance has it.
    other = np.asarray(jax.vmap(lambda k: drop(x, k, "k", 0.3))(keys)) != 0
    for a, b in ((kept[:, 0], kept[:, 1]), (kept[:, :, 0], kept[:, :, 1]), (kept[..., 0], kept[..., 1]), (kept, other)):
        chance = 0.7**2 + 0.3**2
        assert abs((a == b).mean() - chance) < 5 * np.sqrt(chance * (1 - chance) / a.size)


def test_rows_keep_their_keys_wherever_they_lie() -> None:
    episode, segment = jnp.asarray([3, 1, 3], jnp.int32), jnp.asarray([0, 0, 1], jnp.int32)
    keys = jax.random.key_data(row_keys(jax.random.key(0), episode, segment))
    assert len({tuple(k) for k in np.asarray(keys).tolist()}) == 3
    np.testing.assert_array_equal(jax.random.key_data(row_keys(jax.random.key(0), episode[1:], segment[1:])), keys[1:])


def test_only_a_key_drops_and_each_block_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn = with_lora(SPEC, moved=True)
    dropping = replace(model, lora=LoRAConfig(rank=3, alpha=6, dropout=0.5))
    np.testing.assert_array_equal(hidden(dropping, drawn), hidden(model, drawn))
    used: dict[str, set[tuple[int, ...]]] = {}

    def spied(x: jax.Array, key_B: jax.Array, name: str, rate: float) -> jax.Array:
        def see(data: Any) -> None:
            used.setdefault(name, set()).update(map(tuple, np.asarray(data).tolist()))

        jax.debug.callback(see, jax.random.key_data(key_B))
        return drop(x, key_B, name, rate)

    monkeypatch.setattr("ppojax.models.decoder.drop", spied)
    place_BT, keys = positions(TOKEN_BT), jax.random.split(jax.random.key(0), 2)
    run = jax.jit(lambda k: hidden_states(dropping, drawn, TOKEN_BT, place_BT, key_B=k).hidden_BTD)
    first = run(keys)
    jax.effects_barrier()
    assert {name: len(of) for name, of in used.items()} == dict.fromkeys(drawn["layers"]["lora"], 4)  # blocks x rows
    np.testing.assert_array_equal(run(keys), first)
    assert np.abs(np.asarray(run(keys[::-1])) - np.asarray(first)).max() > 0.1


def test_a_model_without_adapters_does_not_take_them() -> None:
    _, drawn = with_lora(SPEC)
    with pytest.raises((AssertionError, ValueError)):
        hidden(replace(ModelDef(SPEC), lora=None), drawn)
