"""Train state: float32 masters and optimizer state, created and pinned on the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import optax

from ppojax.mesh import RULES, SPREAD, replicated
from ppojax.models.forward import ModelDef, Params, param_shardings
from ppojax.models.lora import split
from ppojax.models.perturb import NAME
from ppojax.transfer import put
from ppojax.types import Mean, Metrics, TrainState

LOSS_SCALE_START, LOSS_SCALE_MOST, LOSS_SCALE_PERIOD = 10, 24, 1000  # powers of two; optimizer steps


def state_shardings(
    model: ModelDef,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    perturbed: bool = False,
    spread: bool = False,
) -> Any:
    """Shardings of a train state, in its shape: moments lie as their parameters do, counters everywhere.

    `perturbed`: the state has the deviations of noise beside the model's parameters (`ppojax.models.perturb`).
    `spread`: moments are split over `data` as well (`OptimizerConfig.over_data`).
    """
    everywhere = replicated(mesh)

    def lie(rules: Mapping[str, tuple[str, ...]]) -> Params:
        trained, _ = split(param_shardings(model, mesh, rules), model.lora)
        return {**trained, NAME: everywhere} if perturbed else trained

    params = lie(RULES)
    abstract = jax.eval_shape(optimizer.init, jax.tree.map(lambda _: jnp.float32(0), params))

    def masked(leaf: Any) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    opt_state = optax.tree_map_params(
        optimizer.init,
        lambda leaf, s: leaf if masked(leaf) else s,
        abstract,
        lie(SPREAD) if spread else params,
        transform_non_params=lambda _: everywhere,
        is_leaf=masked,
    )
    return TrainState(params, opt_state, cast(Any, everywhere), cast(Any, everywhere))


def init_state(
    model: ModelDef,
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    donate: bool = False,
    spread: bool = False,
) -> TrainState:
    """Place the parameters that are trained, float32, on the mesh and start the optimizer beside them.

    With `donate` the state takes over the arrays of `params` where they lie as it wants them: there is no second copy,
    and they cannot be used afterwards.

    The state of an ensemble is the states of its critics, on a leading axis of every array.
    """
    shardings = state_shardings(model, optimizer, mesh, perturbed=NAME in params, spread=spread)
    placed = put(jax.tree.map(lambda p: p.astype("float32"), params), shardings.params)

    def start(p: Params) -> TrainState:
        return TrainState(p, optimizer.init(p), jnp.int32(0), jnp.zeros(2, jnp.int32))

    every = start if model.count == 1 else jax.vmap(start)
    return jax.jit(every, out_shardings=shardings, donate_argnums=(0,) if donate else ())(placed)


def place_frozen(model: ModelDef, frozen: Params, mesh: jax.sharding.Mesh) -> Params:
    """Place the weights beside adapters on the mesh, in their own type."""
    return put(frozen, split(param_shardings(model, mesh), model.lora)[1] if frozen else {})


def apply_gradients(
    state: TrainState,
    grads: Params,
    weight: jax.Array,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step. The caller pins the result to the mesh.

    Parameters, moments and schedule stay as they are, to the bit, if a gradient is not finite (which is counted), or
    if nothing in the minibatch had any weight (where stale momentum alone would move them).
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, state.params)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    in_all, in_a_row = state.skipped
    applied = finite & (weight > 0)
    good = jnp.stack([in_all, jnp.where(applied, jnp.zeros_like(in_a_row), in_a_row)])
    skipped = jnp.where(finite, good, state.skipped + 1)
    new = TrainState(params, opt_state, state.step + 1, skipped)
    new = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, state._replace(skipped=skipped))
    one = jnp.float32(1)
    metrics: Metrics = {"grad_norm": Mean(norm, one), "skipped": Mean(1 - finite.astype(jnp.float32), one)}
    return new, metrics


def loss_scale(state: TrainState, dtype: str) -> jax.Array | None:
    """What a loss is multiplied by where gradients are computed in float16; None for other types.

    2^(10 - refused + applied // 1000), between 1 and 2^24: halved by every update that was refused as non-finite,
    doubled by every thousand that were applied (arXiv 1710.03740, section 3.2, counted from the start of the run).
    Losses are sums over tokens, so that 1 is about what other trainers' 2^10 and more is.
    """
    if dtype != "float16":
        return None
    power = LOSS_SCALE_START - state.skipped[0] + state.step // LOSS_SCALE_PERIOD
    return jnp.exp2(jnp.clip(power, 0, LOSS_SCALE_MOST).astype(jnp.float32))


def skipped_in_a_row(state: TrainState) -> int:
    """Updates refused as non-finite since the last good one; of the critic that has most."""
    return int(jax.device_get(state.skipped)[..., 1].max())


def abstract_state(state: Any) -> Any:
    """Shapes, types and shardings of a state: the template of a restore."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
