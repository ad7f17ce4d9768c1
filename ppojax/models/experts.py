"""The experts of one layer: what a device that holds some of them computes."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ppojax.models.activation import gated
from ppojax.models.grouped import Method, grouped
from ppojax.models.spec import Activation

# Name and logical axes; the biases are there only where the spec has them.
EXPERT_WEIGHTS: Mapping[str, tuple[str | None, ...]] = {
    "expert_gate": ("experts", "embed", "ffn"),
    "expert_up": ("experts", "embed", "ffn"),
    "expert_down": ("experts", "ffn", "embed"),
    "expert_gate_bias": ("experts", "ffn"),
    "expert_up_bias": ("experts", "ffn"),
    "expert_down_bias": ("experts", None),
}


def apply_experts(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    weight_NK: jax.Array,
    weights: Mapping[str, jax.Array],
    activation: Activation,
    method: Method,
) -> jax.Array:
    """sum_k weight_nk expert_nk(x_n): assignments sorted by expert, three grouped products, sorted back."""
    sorting = Sorting(expert_NK.reshape(-1), weights["expert_gate"].shape[0])
    y_MD = run_experts(deal(x_ND, sorting.order, sorting.inverse), sorting, weights, activation, method)
    return combine(pick(y_MD, sorting.inverse, sorting.order), weight_NK)


class Sorting:
    """Assignments in the order of their experts; an expert of `experts` is none, and comes last."""

    def __init__(self, expert_M: jax.Array, experts: int) -> None:
        self.order = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
        self.inverse = jnp.argsort(self.order).astype(jnp.int32)
        self.expert = expert_M[self.order]
        self.size_E = jnp.bincount(expert_M, length=experts).astype(jnp.int32)


def run_experts(
    x_MD: jax.Array, sorting: Sorting, weights: Mapping[str, jax.Array], activation: Activation, method: Method
) -> jax.Array:
    """down(act(gate(x)) * up(x)) with each row's expert, rows sorted; rows of no expert give what is dropped later."""

    def product(x: jax.Array, name: str) -> jax.Array:
        y = grouped(x, weights[name], sorting.size_E, method)
        bias = weights.get(f"{name}_bias")
        return y if bias is None else y + jnp.take(bias, sorting.expert, axis=0, mode="fill", fill_value=0)

    h = gated(activation, product(x_MD, "expert_gate"), product(x_MD, "expert_up"))
    return product(h, "expert_down")


def combine(y_MD: jax.Array, weight_NK: jax.Array) -> jax.Array:
    """sum_k weight_nk y_nk in float32, in the type of y."""
    y_NKD = y_MD.reshape(*weight_NK.shape, -1)
    mixed_ND = jnp.einsum("nkd,nk->nd", y_NKD.astype(jnp.float32), weight_NK.astype(jnp.float32))
    return mixed_ND.astype(y_MD.dtype)


@jax.custom_vjp
def pick(x_MD: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """x[index], and zeros where an index lies outside of x; no row is picked twice, and `back` undoes it.

    The gradient is then dy[back], a gather, where autodiff would scatter and add.
    """
    return jnp.take(x_MD, index, axis=0, mode="fill", fill_value=0)


def _pick_forward(x_MD: jax.Array, index: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pick(x_MD, index, back), back


def _pick_backward(back: jax.Array, dy_MD: jax.Array) -> tuple[jax.Array, None, None]:
    return jnp.take(dy_MD, back, axis=0, mode="fill", fill_value=0), None, None


pick.defvjp(_pick_forward, _pick_backward)


@jax.custom_vjp
def deal(x_ND: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Copies of the rows of x, one for each of their K assignments, in the order of the assignments' experts.

    As `pick` of every row written K times, which is not formed.
    """
    return x_ND[order // (order.shape[0] // x_ND.shape[0])]


def _deal_forward(
    x_ND: jax.Array, order: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return deal(x_ND, order, inverse), (inverse, jnp.zeros((x_ND.shape[0], 0), x_ND.dtype))


def _deal_backward(saved: tuple[jax.Array, jax.Array], dy_MD: jax.Array) -> tuple[jax.Array, None, None]:
    inverse, like = saved
    dx_NKD = dy_MD[inverse].reshape(like.shape[0], -1, dy_MD.shape[1])
    return jnp.sum(dx_NKD, axis=1, dtype=jnp.float32).astype(like.dtype), None, None


deal.defvjp(_deal_forward, _deal_backward)
