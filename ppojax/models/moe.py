"""Mixtures of experts: a router chooses K of E small MLPs for each token, and weighs what they say.

No token is ever dropped: the N x K assignments are sorted by expert and multiplied as groups (`grouped`), on one device
or over the `expert` axis of a mesh (`ppojax.models.exchange`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ppojax.models.exchange import over_mesh
from ppojax.models.experts import EXPERT_WEIGHTS, apply_experts
from ppojax.models.grouped import default_method
from ppojax.models.spec import Activation, MoESpec
from ppojax.types import Routing

CHOICE = "chosen_experts"  # the name of what rematerialisation keeps


def mix(
    x_ND: jax.Array,
    weights: Mapping[str, jax.Array],
    spec: MoESpec,
    activation: Activation,
    *,
    routed_NK: jax.Array | None = None,
    valid_N: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, Routing]:
    """y_n = sum over the chosen experts e of weight_ne * expert_e(x_n).

    Args:
        x_ND: what the MLP reads.
        weights: one layer's `router` [D, E] (`router_bias`, `choice_bias` [E]), `expert_gate`, `expert_up` [E, D, F],
            `expert_down` [E, F, D] and their biases where the spec has them.
        spec: how many experts, and how they are chosen.
        activation: of the experts.
        routed_NK: experts chosen earlier, int, which replace this router's choice; -1 leaves the choice free. Their
            weights are still this router's, so that its gradient flows through them (R3, arXiv 2510.11370).
        valid_N: tokens that count in the sums of `Routing`; None: all.
        mesh: where tokens are exchanged between the experts' devices; None on one device.

    Returns:
        `y_ND`, and what the router did. `choice_bias` gets no gradient.
    """
    routes = route(x_ND, weights, spec, routed_NK, valid_N)
    own = {name: weights[name] for name in EXPERT_WEIGHTS if name in weights}
    expert_NK, weight_NK, method = routes.routing.expert_NK, routes.weight_NK, default_method(mesh)
    if mesh is None or mesh.size == 1:
        return apply_experts(x_ND, expert_NK, weight_NK, own, activation, method), routes.routing
    return over_mesh(x_ND, expert_NK, weight_NK, own, activation, method, mesh), routes.routing


class Routes(NamedTuple):
    """A choice of experts and the weights of what they say."""

    weight_NK: jax.Array  # float32
    routing: Routing


def route(
    x_ND: jax.Array,
    weights: Mapping[str, jax.Array],
    spec: MoESpec,
    routed_NK: jax.Array | None = None,
    valid_N: jax.Array | None = None,
) -> Routes:
    """Score the experts in float32, choose K of them for each token, and weigh them.

    softmax         p = softmax(z), top K of p; weights p, divided by their sum where `normalise` (Qwen3-MoE)
    softmax_chosen  top K of z; weights softmax of the chosen z (gpt-oss)
    sigmoid         s = sigmoid(z); with c = s + choice_bias, the `groups_chosen` groups with the largest sum of their
                    two best c stay, and the top K of their c are chosen; weights s, divided by their sum + 1e-20
                    (DeepSeek-V3, arXiv 2412.19437, eq. 12-16)

    with z = x router + router_bias; weights are multiplied by `scale`. Arguments as in `mix`.
    """
    logits_NE = jnp.matmul(
        x_ND.astype(jnp.float32), weights["router"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if spec.router_bias:
        logits_NE = logits_NE + weights["router_bias"].astype(jnp.float32)[None, :]
    if spec.scoring == "sigmoid":
        score_NE = jax.nn.sigmoid(logits_NE)
        probability_NE = score_NE / (jnp.sum(score_NE, axis=-1, keepdims=True) + 1e-20)
    else:
        score_NE = probability_NE = jax.nn.softmax(logits_NE, axis=-1)
    free_NK = _choose(jax.lax.stop_gradient(score_NE), weights, spec)
    expert_NK = free_NK
    if routed_NK is not None:
        expert_NK = jnp.where(routed_NK >= 0, routed_NK.astype(jnp.int32), free_NK)
    expert_NK = checkpoint_name(expert_NK, CHOICE)
    if spec.scoring == "softmax_chosen":
        weight_NK = jax.nn.softmax(jnp.take_along_axis(logits_NE, expert_NK, axis=-1), axis=-1)
    else:
        weight_NK = jnp.take_along_axis(score_NE, expert_NK, axis=-1)
        if spec.normalise:
            weight_NK = weight_NK / (jnp.sum(weight_NK, axis=-1, keepdims=True) + 1e-20)
    routing = _summarise(logits_NE, probability_NE, expert_NK, free_NK, valid_N)
    return Routes(weight_NK * spec.scale, routing)


def _choose(score_NE: jax.Array, weights: Mapping[str, jax.Array], spec: MoESpec) -> jax.Array:
    N, E = score_NE.shape
    if spec.choice_bias:
        bias_E = jax.lax.stop_gradient(weights["choice_bias"]).astype(jnp.float32)
        score_NE = score_NE + bias_E[None, :]
    if spec.groups_chosen < spec.groups:
        score_NGe = score_NE.reshape(N, spec.groups, -1)
        best_NGe, _ = jax.lax.top_k(score_NGe, min(2, score_NGe.shape[-1]))
        _, kept_Ng = jax.lax.top_k(jnp.sum(best_NGe, axis=-1), spec.groups_chosen)
        kept_NG = jnp.any(kept_Ng[:, :, None] == jnp.arange(spec.groups, dtype=kept_Ng.dtype)[None, None, :], axis=1)
        score_NE = jnp.where(kept_NG[:, :, None], score_NGe, -jnp.inf).reshape(N, E)
    return jax.lax.top_k(score_NE, spec.chosen)[1].astype(jnp.int32)


def _summarise(
    logits_NE: jax.Array,
    probability_NE: jax.Array,
    expert_NK: jax.Array,
    free_NK: jax.Array,
    valid_N: jax.Array | None,
) -> Routing:
    N, E = logits_NE.shape
    valid_N = jnp.ones(N, bool) if valid_N is None else valid_N
    experts_E = jnp.arange(E, dtype=jnp.int32)
    chosen_NE = jnp.any(expert_NK[:, :, None] == experts_E[None, None, :], axis=1) & valid_N[:, None]
    agreed_NK = jnp.any(expert_NK[:, :, None] == free_NK[:, None, :], axis=2) & valid_N[:, None]
    z_N = jnp.square(jax.nn.logsumexp(logits_NE, axis=-1))
    return Routing(
        expert_NK=expert_NK,
        load_E=jnp.sum(chosen_NE, axis=0, dtype=jnp.float32),
        probability_E=jnp.sum(jnp.where(valid_N[:, None], probability_NE, 0.0), axis=0),
        z=jnp.sum(jnp.where(valid_N, z_N, 0.0)),
        agreed=jnp.sum(agreed_NK, dtype=jnp.float32),
        tokens=jnp.sum(valid_N, dtype=jnp.float32),
    )
