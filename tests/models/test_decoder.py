"""The decoder against the same blocks written in float64 numpy; `linear` and remat against autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoder_by_hand import SPECS, by_hand, drawn
from ppojax.models.forward import ModelDef, Params, head_VD, hidden_states, logits, positions
from ppojax.models.linear import linear
from ppojax.models.spec import Remat

SPEC = SPECS["llama"].model_copy(update={"tied": True})
TOKEN_BT = np.random.default_rng(0).integers(0, 32, (2, 11))


@pytest.mark.parametrize("name", SPECS)
def test_the_decoder_is_the_block_written_by_hand(name: str) -> None:
    spec = SPECS[name]
    p = drawn(spec)
    assert ("head" in p) != spec.tied

    @jax.jit
    def both(p: Params, token_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, *_ = hidden_states(ModelDef(spec), p, token_BT, positions(token_BT))
        return hidden_BTD, logits(ModelDef(spec), head_VD(p), hidden_BTD)

    hidden_BTD, logits_BTV = both(p, jnp.asarray(TOKEN_BT, jnp.int32))
    for b in range(2):
        want_TD, want_TV = by_hand(spec, p, TOKEN_BT[b])
        # Float32 sums of some 20 terms through three blocks: a few units of 2^-23 on values of order one.
        np.testing.assert_allclose(hidden_BTD[b], want_TD, rtol=3e-5, atol=3e-5)
        np.testing.assert_allclose(logits_BTV[b], want_TV, rtol=3e-5, atol=3e-5)


def test_positions_are_relative() -> None:
    """Moving a whole row along changes nothing: rotary positions enter as differences only."""
    p, token_BT = drawn(SPEC), jnp.asarray(TOKEN_BT, jnp.int32)
    run = jax.jit(lambda shift: hidden_states(ModelDef(SPEC), p, token_BT, positions(token_BT) + shift)[0])
    # Angles grow to 100 radians, where a float32 is exact to 4e-6.
    np.testing.assert_allclose(run(0), run(100), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_linear_has_the_gradients_of_autodiff(shape: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (3, 7))
    dy = jax.random.normal(keys[2], (*shape[:-1], 7))
    y, back = jax.vjp(linear, x, w)
    want, want_back = jax.vjp(lambda x, w: x @ w, x, w)
    np.testing.assert_array_equal(y, want)
    for got, expected in zip(back(dy), want_back(dy), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat: Remat) -> None:
    p, token_BT = drawn(SPEC), jnp.asarray(TOKEN_BT, jnp.int32)
    weight_BTD = jax.random.normal(jax.random.key(1), (2, 11, 24))

    def gradient(remat: Remat) -> Params:
        model = ModelDef(SPEC, remat=remat)
        return jax.jit(
            jax.grad(lambda p: jnp.sum(weight_BTD * hidden_states(model, p, token_BT, positions(token_BT))[0]))
        )(p)

    # The same sums, which XLA may fuse differently: equal up to rounding.
    for a, b in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient("none")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
        assert float(jnp.abs(b).max()) > 0


def test_the_compute_type_is_the_models() -> None:
    """In bfloat16 the masters stay float32, hidden states are bfloat16, and are near those of float32."""
    p, token_BT = drawn(SPEC), jnp.asarray(TOKEN_BT, jnp.int32)

    def run(dtype: str) -> jax.Array:
        return jax.jit(lambda p: hidden_states(ModelDef(SPEC, dtype), p, token_BT, positions(token_BT))[0])(p)

    half, full = run("bfloat16"), run("float32")
    assert half.dtype == jnp.bfloat16
    # 8 bits of mantissa, a dozen roundings in a row: 2^-8 * sqrt(12) is 1.4%, on values up to 3.
    assert float(jnp.abs(half.astype(jnp.float32) - full).max()) < 0.1
