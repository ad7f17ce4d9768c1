"""The decoder against the same block written in float64 numpy; `linear` and remat against autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.models.forward import ModelDef, Params, head_VD, hidden_states, init, positions
from ppojax.models.linear import linear
from ppojax.models.spec import DecoderSpec, Remat, RopeSpec

SPEC = DecoderSpec(
    layers=2, width=24, heads=6, kv_heads=2, head_width=4, ffn=20, vocab=30, rope=RopeSpec(theta=500.0), norm_eps=1e-3
)
TOKEN_BT = np.random.default_rng(0).integers(0, 30, (2, 11))


def drawn(spec: DecoderSpec) -> Params:
    """Parameters in which the norms are not all ones, so that a norm that is left out shows."""
    p = init(ModelDef(spec), jax.random.key(0))
    for at, name in ((p, "norm"), (p["layers"], "attn_norm"), (p["layers"], "mlp_norm")):
        at[name] = 1 + 0.3 * jax.random.normal(jax.random.key(len(name)), at[name].shape)
    return p


def turned(x_F: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Turn the pairs (i, i + F/2) by position * theta^(-2i/F), as complex numbers."""
    half = len(x_F) // 2
    angle = position * theta ** (-2 * np.arange(half) / len(x_F))
    z = (x_F[:half] + 1j * x_F[half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag])


def row_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def by_hand(spec: DecoderSpec, p: Params, token_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and logits of one row, token by token and head by head, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    F, shared = spec.head_width, spec.heads // spec.kv_heads
    x_TD = p["embed"][token_T]
    for n in range(spec.layers):
        w = {name: a[n] for name, a in p["layers"].items()}
        h_TD = row_norm(x_TD, w["attn_norm"], spec.norm_eps)
        q, k, v = (h_TD @ w[name] for name in "qkv")
        attended = np.zeros((len(token_T), spec.heads * F))
        for head in range(spec.heads):
            group = head // shared
            q_TF = np.array([turned(q[t, head * F :][:F], t, spec.rope.theta) for t in range(len(token_T))])
            k_TF = np.array([turned(k[t, group * F :][:F], t, spec.rope.theta) for t in range(len(token_T))])
            for t in range(len(token_T)):
                score = k_TF[: t + 1] @ q_TF[t] / np.sqrt(F)
                weight = np.exp(score - score.max())
                attended[t, head * F :][:F] = weight / weight.sum() @ v[: t + 1, group * F :][:, :F]
        x_TD = x_TD + attended @ w["o"]
        h_TD = row_norm(x_TD, w["mlp_norm"], spec.norm_eps)
        gate = h_TD @ w["gate"]
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (h_TD @ w["up"])) @ w["down"]
    hidden_TD = row_norm(x_TD, p["norm"], spec.norm_eps)
    return hidden_TD, hidden_TD @ p["embed" if spec.tied else "head"].T


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_is_the_block_written_by_hand(tied: bool) -> None:
    spec = SPEC.model_copy(update={"tied": tied})
    p = drawn(spec)
    assert ("head" in p) != tied

    @jax.jit
    def both(p: Params, token_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, *_ = hidden_states(ModelDef(spec), p, token_BT, positions(token_BT))
        return hidden_BTD, hidden_BTD @ head_VD(p).T

    hidden_BTD, logits_BTV = both(p, jnp.asarray(TOKEN_BT, jnp.int32))
    for b in range(2):
        want_TD, want_TV = by_hand(spec, p, TOKEN_BT[b])
        # Float32 sums of at most 24 terms through two blocks: a few units of 2^-23 on values of order one.
        np.testing.assert_allclose(hidden_BTD[b], want_TD, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(logits_BTV[b], want_TV, rtol=1e-5, atol=1e-5)


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
