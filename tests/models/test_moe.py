"""Experts against a loop over tokens in float64; grouped products; replayed choices; what counts as load."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_layer import SPECS, by_hand, hidden, layer_of, loss_of
from ppojax.models import moe
from ppojax.models.grouped import BLOCK, Method, grouped
from ppojax.models.spec import MoESpec

# Eager, each of its some fifty operations is compiled alone.
mix = jax.jit(moe.mix, static_argnames=("spec", "activation"))
CASES = pytest.mark.parametrize("name", SPECS)


@CASES
def test_experts_are_the_loop_over_tokens(name: str) -> None:
    spec, activation = SPECS[name]
    x_ND, weights = hidden(21), layer_of(spec)
    got, routing = mix(x_ND, weights, spec, activation)
    want, chosen = by_hand(x_ND, weights, spec, activation)
    np.testing.assert_array_equal(np.sort(routing.expert_NK, axis=1), np.sort(chosen, axis=1))
    # Sums of at most 12 float32 products, three deep.
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@CASES
def test_gradients_are_those_of_every_expert_on_every_token(name: str) -> None:
    """Autodiff of the masked sum over all experts, which has neither sorting nor grouped products."""
    spec, activation = SPECS[name]
    x_ND, weights = hidden(13), layer_of(spec)
    got = jax.jit(jax.grad(loss_of(spec, activation), (0, 1)))(x_ND, weights)
    want = jax.jit(jax.grad(loss_of(spec, activation, dense=True), (0, 1)))(x_ND, weights)
    for path, a in jax.tree_util.tree_leaves_with_path(got):
        b = dict(jax.tree_util.tree_leaves_with_path(want))[path]
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()), err_msg=str(path))
        still = "choice_bias" in str(path)
        assert (float(jnp.abs(a).max()) == 0) == still, path


def test_groups_limit_the_choice() -> None:
    """Of 4 groups of 2 the two with the largest sums stay; a strong expert in a weak group is not chosen."""
    spec = MoESpec(experts=8, chosen=3, ffn=1, scoring="sigmoid", groups=4, groups_chosen=2, choice_bias=True)
    score = np.array([0.9, 0.05, 0.5, 0.5, 0.6, 0.6, 0.1, 0.1], np.float32)  # group sums .95 1 1.2 .2
    weights = layer_of(spec, width=8)
    weights["router"] = jnp.asarray(np.diag(np.log(score / (1 - score))), jnp.float32)
    weights["choice_bias"] = jnp.zeros(8)
    x_ND = jnp.ones((1, 8))
    choose = lambda w: set(np.asarray(mix(x_ND, w, spec, "silu")[1].expert_NK)[0].tolist())  # noqa: E731
    assert choose(weights) == {2, 4, 5}
    # The bias moves the choice of groups and of experts, and is in no weight.
    weights["choice_bias"] = weights["choice_bias"].at[1].set(0.3).at[3].set(-0.6)
    assert choose(weights) == {0, 4, 5}


@pytest.mark.parametrize("method", ["ragged", "blocks"])
@pytest.mark.parametrize("sizes", [(0, 0, 0), (3, 0, 5), (BLOCK, 1, BLOCK + 1), (0, 2 * BLOCK, 0), (70, 0, 3)])
def test_grouped_products(method: Method, sizes: tuple[int, ...]) -> None:
    """Every row meets its group's matrix; rows behind the last group give zero and pass nothing back."""
    keys = jax.random.split(jax.random.key(0), 3)
    total = sum(sizes)
    x, w = jax.random.normal(keys[0], (total + 4, 3)), jax.random.normal(keys[1], (3, 3, 5))
    dy = jax.random.normal(keys[2], (total + 4, 5))
    y, back = jax.vjp(jax.jit(lambda x, w: grouped(x, w, jnp.array(sizes, jnp.int32), method)), x, w)
    group = np.repeat(np.arange(3), sizes)
    own_w = np.asarray(w)[group]
    np.testing.assert_allclose(y[:total], np.einsum("md,mdf->mf", x[:total], own_w), rtol=1e-5, atol=1e-5)
    assert not np.asarray(y[total:]).any()
    dx, dw = back(dy)
    np.testing.assert_allclose(dx[:total], np.einsum("mf,mdf->md", dy[:total], own_w), rtol=1e-5, atol=1e-5)
    assert not np.asarray(dx[total:]).any()
    for e in range(3):
        own = np.flatnonzero(group == e)
        np.testing.assert_allclose(dw[e], np.asarray(x)[own].T @ np.asarray(dy)[own], rtol=1e-4, atol=1e-4)


@CASES
def test_a_replayed_choice_is_taken_and_weighed_by_the_router(name: str) -> None:
    spec, activation = SPECS[name]
    x_ND, weights = hidden(9), layer_of(spec)
    rng = np.random.default_rng(3)
    routed = np.stack([rng.permutation(spec.experts)[: spec.chosen] for _ in range(9)]).astype(np.int16)
    routed[4:] = -1  # free
    run = lambda x, w, r: mix(x, w, spec, activation, routed_NK=r)  # noqa: E731
    got, routing = run(x_ND, weights, jnp.asarray(routed))
    np.testing.assert_array_equal(routing.expert_NK[:4], routed[:4])
    want, chosen = by_hand(x_ND, weights, spec, activation, routed)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())
    free = mix(x_ND, weights, spec, activation)[1]
    np.testing.assert_array_equal(routing.expert_NK[4:], free.expert_NK[4:])
    same = [len(set(a) & set(b)) for a, b in zip(chosen.tolist(), np.asarray(free.expert_NK).tolist(), strict=True)]
    assert float(routing.agreed) == sum(same) < float(free.agreed) == 9 * spec.chosen
    # Replaying the free choice changes nothing at all, and the gradient still reaches the router.
    again, _ = run(x_ND, weights, free.expert_NK)
    np.testing.assert_array_equal(again, run(x_ND, weights, jnp.full_like(free.expert_NK, -1))[0])
    grad = jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(run(x_ND, w, jnp.asarray(routed))[0]))))(weights)
    assert float(jnp.abs(grad["router"]).max()) > 1e-4


def test_load_counts_what_is_valid() -> None:
    spec, activation = SPECS["softmax"]
    x_ND, weights = hidden(12), layer_of(spec)
    valid = np.arange(12) % 3 > 0
    _, routing = mix(x_ND, weights, spec, activation, valid_N=jnp.asarray(valid))
    chosen = np.asarray(routing.expert_NK)[valid]
    np.testing.assert_array_equal(routing.load_E, np.bincount(chosen.ravel(), minlength=spec.experts))
    logits = np.asarray(x_ND @ weights["router"], np.float64)[valid]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.probability_E, p.sum(0), rtol=1e-5)
    np.testing.assert_allclose(routing.z, (np.log(np.exp(logits).sum(-1)) ** 2).sum(), rtol=1e-5)
    assert float(routing.tokens) == valid.sum() and float(routing.agreed) == valid.sum() * spec.chosen


def test_half_precision_stays_near() -> None:
    """Router in float32, experts in bfloat16: 8 bits of mantissa through three products."""
    for spec, activation in SPECS.values():
        x_ND, weights = hidden(32), layer_of(spec)
        half = {n: w if "router" in n or "choice" in n else w.astype(jnp.bfloat16) for n, w in weights.items()}
        x_half = x_ND.astype(jnp.bfloat16)
        got, routing = mix(x_half, half, spec, activation)
        want, _ = mix(x_half.astype(jnp.float32), weights, spec, activation, routed_NK=routing.expert_NK)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"chosen": 5}, "moe.chosen (5) is over moe.experts (4)"),
        ({"chosen": 3, "groups": 2}, "moe.chosen (3) is over the 2 experts of moe.groups_chosen = 1 of 2 groups"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        MoESpec(**({"experts": 4, "chosen": 1, "ffn": 2} | bad))
    assert says in str(caught.value)
