"""FLOPs by formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from ppojax.models.flops import peak_flops, update_flops
from ppojax.models.forward import ModelDef, head_VD, hidden_states, init, positions
from ppojax.models.spec import DecoderSpec, MoESpec

SPEC = DecoderSpec(layers=1, width=64, heads=4, kv_heads=2, head_width=16, ffn=160, vocab=96)


def test_by_hand() -> None:
    """q, o 64x64, k, v 64x32, gate, up, down 64x160; norms are too small to matter but are counted."""
    matrices = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
    expected = 6 * (10 * matrices + 4 * 96 * 64) + 6 * 4 * (16 + 16) * 100
    assert update_flops(SPEC, positions=10, pairs=100, scored=4) == expected


def test_a_compiler_counts_the_same_products() -> None:
    """One block, so that the scan's body is all there is; elementwise work makes its count a little larger."""
    model = ModelDef(SPEC, remat="none")
    params = init(model, jax.random.key(0))
    token_BT = jnp.zeros((4, 32), jnp.int32)

    def loss(params: dict) -> jax.Array:
        hidden_BTD = hidden_states(model, params, token_BT, positions(token_BT)).hidden_BTD
        return jnp.sum(hidden_BTD @ head_VD(params).T)

    cost = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()
    counted = update_flops(SPEC, positions=128, pairs=4 * 32 * 32, scored=128)
    assert cost["flops"] == pytest.approx(counted, rel=0.15)


def test_of_the_experts_only_the_chosen_count() -> None:
    moe = MoESpec(experts=8, chosen=2, ffn=32)
    sparse = update_flops(SPEC.model_copy(update={"moe": moe}), 1, 0, 0)
    everyone = update_flops(SPEC.model_copy(update={"moe": moe.model_copy(update={"chosen": 8})}), 1, 0, 0)
    assert everyone - sparse == 6 * 3 * 64 * 32 * 6


@pytest.mark.parametrize(
    ("kind", "peak"), [("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("cpu", None)]
)
def test_peaks(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak
