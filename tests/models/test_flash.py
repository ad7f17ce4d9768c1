"""When cuDNN attends and when it does not; and that it gives what XLA gives (its own numbers need a GPU)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoder_by_hand import SPECS, drawn
from ppojax.models import decoder
from ppojax.models.attention import Scores, attend, masks
from ppojax.models.flash import _say, flash, refusal, use_flash
from ppojax.models.forward import ModelDef, Params, hidden_states, positions
from ppojax.models.spec import DecoderSpec, MLASpec, RopeSpec

SPEC = DecoderSpec(
    layers=3, width=64, heads=4, kv_heads=2, head_width=16, ffn=32, vocab=32, qk_norm=True, window=5,
    windowed=(True, False, True), local_rope=RopeSpec(theta=100.0),
)  # fmt: skip
TOKEN_BT = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 24)), jnp.int32)


@pytest.fixture(autouse=True)
def said_nothing_yet() -> Iterator[None]:
    _say.cache_clear()
    yield
    _say.cache_clear()


MLA = MLASpec(kv_rank=8, nope_width=8, rope_width=8, value_width=8)


@pytest.mark.parametrize(
    ("changes", "call", "reason"),
    [
        ({}, {}, None),
        ({}, {"dtype": "float16"}, None),
        ({}, {"platform": "cpu"}, "cuDNN runs on a GPU, this is cpu"),
        ({}, {"dtype": "float32"}, "the compute type is float32, cuDNN takes bfloat16 and float16"),
        ({"sinks": True}, {}, "the model has attention sinks"),
        ({"attention_softcap": 50.0}, {}, "the model caps its scores (attention_softcap)"),
        ({"head_width": 12}, {}, "heads are 12 wide, cuDNN takes multiples of 8 up to 256"),
        ({"head_width": 320}, {}, "heads are 320 wide, cuDNN takes multiples of 8 up to 256"),
        ({"mla": MLA, "kv_heads": 4}, {}, "keys are 16 wide and values 8, cuDNN takes one width"),
        ({}, {"cached": True}, "tokens stand behind a cache, cuDNN takes whole rows"),
        ({}, {"packed": True}, "rows are packed behind a shared prompt (update.shared_prefix), cuDNN takes plain rows"),
    ],
)
def test_what_cudnn_does_not_take(changes: dict[str, Any], call: dict[str, Any], reason: str | None) -> None:
    settings: dict[str, Any] = {"dtype": "bfloat16", "platform": "gpu", "cached": False, "packed": False} | call
    assert refusal(SPEC.model_copy(update=changes), **settings) == reason


def test_a_refusal_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, p = ModelDef(SPEC, attention="cudnn", remat="none"), drawn(SPEC)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            jax.eval_shape(partial(hidden_states, model), p, TOKEN_BT, positions(TOKEN_BT))
    assert [record.getMessage() for record in caplog.records] == [
        "model.attention=cudnn: XLA attends instead: cuDNN runs on a GPU, this is cpu"
    ]


@pytest.mark.parametrize("choice", ["auto", "xla"])
def test_xla_needs_no_word(choice: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not use_flash(choice, SPEC, "float32", cached=False, packed=False)
    assert not caplog.records


@pytest.mark.parametrize(
    "name", ["nope", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mixed windows", "one window"))]
)
def test_the_decoder_calls_flash_attention_as_it_should(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call, computed by XLA: scales, windows of each block, groups of heads."""
    spec = {
        "mixed windows": SPEC.model_copy(update={"attention_scale": 0.3}),
        "one window": SPEC.model_copy(update={"windowed": (True,) * 3}),
        "nope": SPECS["nope"],
    }[name]
    model, p = ModelDef(spec, remat="none"), drawn(spec)
    weight_BTD = jax.random.normal(jax.random.key(0), (*TOKEN_BT.shape, spec.width))

    def run(p: Params) -> tuple[jax.Array, jax.Array]:
        hidden_BTD = hidden_states(model, p, TOKEN_BT, positions(TOKEN_BT)).hidden_BTD
        return jnp.sum(weight_BTD * hidden_BTD), hidden_BTD

    (_, want), want_grad = jax.jit(jax.value_and_grad(run, has_aux=True))(p)
    monkeypatch.setattr(decoder, "use_flash", lambda *_, **__: True)
    monkeypatch.setattr(decoder, "flash", partial(flash, implementation="xla"))
    (_, got), grad = jax.jit(jax.value_and_grad(lambda p: run(p), has_aux=True))(p)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(want_grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_cudnn_gives_what_xla_gives(width: int, window: int | None, dtype: str) -> None:
    """Values and gradients, both against XLA in float32 on the same rounded inputs."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 200, heads, width)), dtype) for heads in (8, 2, 2))
    weight = jnp.asarray(rng.normal(size=(2, 200, 8 * width)), jnp.float32)
    (mask,) = masks(positions(jnp.zeros((2, 200), jnp.int32)), 0, None, window)
    scale = width**-0.5

    def both(function: Any, *args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def total(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = function(*args)
            return jnp.sum(weight * out.astype(jnp.float32)), out

        (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*args)
        return out, grads

    got, grads = both(lambda q, k, v: flash(q, k, v, scale=scale, window=window), q, k, v)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        want, want_grads = both(lambda q, k, v: attend(q, [k], [v], mask, Scores(scale)), *exact)
    # Weights and results are rounded to 8 bits (bfloat16) or 11: a few units of it, relative to the largest.
    bound = {"bfloat16": 2e-2, "float16": 3e-3}[dtype]
    for a, b in zip((got, *grads), (want, *want_grads), strict=True):
        assert a.dtype == dtype
        assert np.abs(np.asarray(a, np.float32) - np.asarray(b)).max() < bound * np.abs(b).max()


@pytest.mark.gpu
def test_a_model_on_cudnn_is_near_the_model_on_xla() -> None:
    p = drawn(SPEC)
    run = jax.jit(hidden_states, static_argnames="model")
    model = ModelDef(SPEC, "bfloat16", attention="cudnn")
    assert use_flash("cudnn", SPEC, "bfloat16", cached=False, packed=False)
    got, want = (
        run(m, p, TOKEN_BT, positions(TOKEN_BT)).hidden_BTD.astype(jnp.float32)
        for m in (model, replace(model, attention="xla"))
    )
    assert float(jnp.abs(got - want).max()) < 0.1  # as between bfloat16 and float32, see test_decoder
