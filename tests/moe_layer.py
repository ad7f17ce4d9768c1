"""A layer of experts drawn at random, and what it computes, written by hand."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ppojax.models.activation import gated
from ppojax.models.moe import mix, route
from ppojax.models.spec import Activation, MoESpec

WIDTH = 12
SPECS: dict[str, tuple[MoESpec, Activation]] = {
    "softmax": (MoESpec(experts=8, chosen=2, ffn=6), "silu"),
    "softmax raw": (MoESpec(experts=8, chosen=3, ffn=6, normalise=False), "gelu_tanh"),
    "chosen": (
        MoESpec(experts=8, chosen=4, ffn=6, scoring="softmax_chosen", router_bias=True, expert_bias=True),
        "clipped_swiglu",
    ),
    "sigmoid": (
        MoESpec(
            experts=8, chosen=3, ffn=6, scoring="sigmoid", groups=4, groups_chosen=2, scale=2.5, choice_bias=True
        ),
        "silu",
    ),
}  # fmt: skip


def hidden(rows: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, WIDTH))


def layer_of(spec: MoESpec, seed: int = 1, width: int = WIDTH) -> dict[str, jax.Array]:
    E, F = spec.experts, spec.ffn
    shapes = {
        "router": (width, E),
        "expert_gate": (E, width, F),
        "expert_up": (E, width, F),
        "expert_down": (E, F, width),
    }
    if spec.router_bias:
        shapes["router_bias"] = (E,)
    if spec.choice_bias:
        shapes["choice_bias"] = (E,)
    if spec.expert_bias:
        shapes |= {"expert_gate_bias": (E, F), "expert_up_bias": (E, F), "expert_down_bias": (E, width)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {name: 0.4 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def loss_of(spec: MoESpec, activation: Activation, *, dense: bool = False) -> Callable[..., jax.Array]:
    """A smooth scalar of the layer's output, its balance and its z; `dense` sums over all experts with a mask."""

    def loss(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        if not dense:
            y, routing = mix(x, w, spec, activation)
        else:
            routes = route(x, w, spec)
            routing = routes.routing
            weight_NE = jnp.zeros((x.shape[0], spec.experts)).at[jnp.arange(x.shape[0])[:, None], routing.expert_NK]
            y = jnp.einsum("ne,end->nd", weight_NE.add(routes.weight_NK), every_expert(x, w, activation))
        return jnp.sum(jnp.sin(y)) + jnp.sum(routing.probability_E * routing.load_E) + routing.z

    return loss


def every_expert(x: jax.Array, w: dict[str, jax.Array], activation: Activation) -> jax.Array:
    """What every expert says to every token, `[E, N, D]`."""

    def product(equation: str, x: jax.Array, name: str) -> jax.Array:
        y, bias = jnp.einsum(equation, x, w[name]), w.get(f"{name}_bias")
        return y if bias is None else y + bias[:, None, :]

    h = gated(activation, product("nd,edf->enf", x, "expert_gate"), product("nd,edf->enf", x, "expert_up"))
    return product("enf,efd->end", h, "expert_down")


def by_hand(
    x_ND: jax.Array,
    weights: dict[str, jax.Array],
    spec: MoESpec,
    activation: Activation,
    routed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and choice, token by token and expert by expert, in float64."""
    w = {name: np.asarray(a, np.float64) for name, a in weights.items()}
    out, choice = [], []
    for n, x in enumerate(np.asarray(x_ND, np.float64)):
        z = x @ w["router"] + w.get("router_bias", 0)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        s = 1 / (1 + np.exp(-z)) if spec.scoring == "sigmoid" else p
        biased = s + w.get("choice_bias", 0)
        if spec.groups > 1:
            groups = biased.reshape(spec.groups, -1)
            best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1))[: spec.groups_chosen]
            biased = np.where(np.isin(np.arange(spec.experts) // groups.shape[1], best), biased, -np.inf)
        experts = np.argsort(-biased)[: spec.chosen]
        if routed is not None and routed[n, 0] >= 0:
            experts = routed[n]
        gate = s[experts]
        if spec.scoring == "softmax_chosen":
            gate = np.exp(z[experts]) / np.exp(z[experts]).sum()
        elif spec.normalise:
            gate = gate / gate.sum()
        y = np.zeros(len(x))
        for g, e in zip(gate, experts, strict=True):
            a = x @ w["expert_gate"][e] + (w["expert_gate_bias"][e] if spec.expert_bias else 0)
            b = x @ w["expert_up"][e] + (w["expert_up_bias"][e] if spec.expert_bias else 0)
            if activation == "clipped_swiglu":
                a, b = np.minimum(a, 7), np.clip(b, -7, 7)
                h = a / (1 + np.exp(-1.702 * a)) * (b + 1)
            elif activation == "gelu_tanh":
                h = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) * b
            else:
                h = a / (1 + np.exp(-a)) * b
            y += spec.scale * g * (h @ w["expert_down"][e] + (w["expert_down_bias"][e] if spec.expert_bias else 0))
        out.append(y)
        choice.append(experts)
    return np.array(out), np.array(choice)
