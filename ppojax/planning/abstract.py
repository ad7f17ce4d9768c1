"""The arguments of a run's programs as shapes, types and shardings: no weight is ever made."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppojax.config import Config
from ppojax.experience.batch import make_batch
from ppojax.mesh import sharding
from ppojax.models.forward import ModelDef, Params, abstract_params, compute_type, param_shardings
from ppojax.models.lora import split
from ppojax.models.perturb import NAME
from ppojax.planning.workload import Workload
from ppojax.rollout.sampler import SamplerDef, Slots, empty, places, record_shapes
from ppojax.rollout.sync import narrower
from ppojax.types import Batch, Experience, TrainState
from ppojax.update.state import init_state, state_shardings


def shape(dims: tuple[int, ...], dtype: Any, place: Any = None) -> Any:
    """An array that is not there: it stands where one is expected."""
    return jax.ShapeDtypeStruct(dims, dtype, sharding=place)


def placed(tree: Any, shardings: Any) -> Any:
    """Give shapes their shardings; one for all of them, or each its own."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: shape(x.shape, x.dtype, s), tree, shardings)


def bytes_of(tree: Any) -> int:
    """Bytes that each device holds of arrays with shardings; those without are whole everywhere."""

    def one(x: Any) -> int:
        dims = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(dims) * (x.dtype.itemsize if jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool else 8)

    return sum(map(one, jax.tree.leaves(tree)))


def masters(model: ModelDef) -> tuple[Params, Params]:
    """Trained and frozen parameters, float32, of all critics where there are more."""
    trained, frozen = split(abstract_params(model.member), model.lora)
    members = () if model.count == 1 else (model.count,)
    return jax.tree.map(lambda p: shape((*members, *p.shape), p.dtype), trained), frozen


def abstract_frozen(model: ModelDef, dtype: str) -> Params:
    """The weights beside adapters, in their own type."""
    assert model.mesh is not None
    shapes = jax.tree.map(lambda p: shape(p.shape, dtype), masters(model)[1])
    return placed(shapes, split(param_shardings(model, model.mesh), model.lora)[1]) if shapes else {}


def abstract_state(
    model: ModelDef, optimizer: optax.GradientTransformation, *, spread: bool, noise: bool = False
) -> TrainState:
    """A train state; `spread` as in `state_shardings`; with `noise` its deviations are among the parameters."""
    mesh = model.mesh
    assert mesh is not None
    trained = masters(model)[0] | ({NAME: shape((model.spec.layers,), jnp.float32)} if noise else {})
    state = jax.eval_shape(lambda p: init_state(model, p, optimizer, mesh), trained)
    return placed(state, state_shardings(model, optimizer, mesh, perturbed=noise, spread=spread))


def abstract_played(sampler: SamplerDef, policy: Params) -> Params:
    """What the sampler reads, see `ppojax.rollout.sync.sampler_params`."""

    def cast(path: tuple, p: Any) -> Any:
        return shape(p.shape, narrower(p, compute_type(sampler.model, path)))

    return placed(jax.tree_util.tree_map_with_path(cast, policy), param_shardings(sampler.model, sampler.mesh))


def abstract_slots(sampler: SamplerDef, played: Params, count: int) -> Slots:
    """The sampler's slots, as `ppojax.rollout.sampler.places` lays them out."""
    slots = jax.eval_shape(partial(empty, sampler=sampler, count=count), played)
    return placed(slots, places(slots, sampler.mesh))


def abstract_experience(config: Config, sampler: SamplerDef, work: Workload, rows: int) -> Experience:
    """Packed rows, before they are scored."""
    spec, moe = sampler.model.spec, sampler.model.spec.moe

    def of_rows(dtype: str, *dims: int) -> Any:
        return shape((rows, *dims), dtype)

    routed = None
    if sampler.record_experts and moe is not None:
        routed = of_rows("int16", work.length, spec.moe_layers, moe.chosen)
    tokens = {"token_BT": "int32", "action_BT": "bool", "logp_behavior_BT": "float32", "reward_BT": "float32"}
    columns = ("length_B", "prefix_B", "ending_B", "group_B", "episode_B", "segment_B")
    hints = config.critic.privileged if config.advantage.needs_values else 0
    return Experience(
        **{name: of_rows(dtype, work.length) for name, dtype in tokens.items()},
        **{name: of_rows("int32") for name in columns},
        valid_B=of_rows("bool"),
        action_index_BA=of_rows("int32", work.actions),
        routed_BTLK=routed,
        recorded=record_shapes(sampler, rows, work.actions),
        hint_BH=of_rows("int32", hints) if hints else None,
        hint_length_B=of_rows("int32") if hints else None,
    )


def scored(config: Config, model: ModelDef, experience: Experience) -> Experience:
    """Rows with what is scored before the update."""
    (rows, length), needs = experience.token_BT.shape, config.needs
    logp = shape((rows, length), jnp.float32)
    values = shape((config.critic.count, rows, length), jnp.float32) if config.advantage.needs_values else None
    hidden = shape((*experience.action_index_BA.shape, model.spec.width), model.dtype)
    return experience._replace(
        logp_old_BT=logp if "logp_old" in needs else None,
        logp_ref_BT=logp if "logp_ref" in needs else None,
        value_MBT=values,
        hidden_ref_BAD=hidden if "hidden_ref" in needs else None,
    )


def abstract_batch(config: Config, experience: Experience) -> Batch:
    """What an optimizer step sees of scored rows."""
    return jax.eval_shape(lambda e: make_batch(e, estimator=config.advantage), experience)


def by_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Rows split over the mesh, as `ppojax.experience.pack.pack` puts them there; values carry the critics in front."""

    def one(path: tuple, x: Any) -> Any:
        before = (None,) if path[-1].name.endswith("_MBT") else ()
        return shape(x.shape, x.dtype, sharding(mesh, (*before, "rows")))

    return jax.tree_util.tree_map_with_path(one, tree)
