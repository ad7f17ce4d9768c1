"""From the trainer's parameters to the sampler's: of its compute type, and lying as its mesh wants them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from ppojax.models.forward import ModelDef, Params, compute_type, param_shardings

Place = tuple[str, jax.sharding.NamedSharding]  # type and sharding of an array


def sampler_params(params: Params, model: ModelDef) -> Params:
    """Take the trainer's parameters to what the sampler, whose model this is, reads; in place where they are that.

    They are cast to the compute type, which gives the same numbers as casting them in every call, unless they are kept
    in a narrower type, and resharded to `model.mesh`, which has the devices of the trainer's mesh or none of them.
    Where nothing is to be done, the very arrays come back.
    """
    assert model.mesh is not None
    if jax.process_count() > 1:
        return _to_own(params, model, model.mesh)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    places = jax.tree.leaves(param_shardings(model, model.mesh))
    wanted: list[Place] = [
        (narrower(leaf, compute_type(model, path)), place) for (path, leaf), place in zip(leaves, places, strict=True)
    ]
    out = [leaf for _, leaf in leaves]
    moved = [i for i, (leaf, place) in enumerate(zip(out, wanted, strict=True)) if not _lies(leaf, place)]
    if moved:
        new = _move([out[i] for i in moved], [wanted[i] for i in moved], model.mesh)
        for i, leaf in zip(moved, new, strict=True):
            out[i] = leaf
    return jax.tree.unflatten(tree, out) if moved else params


def _move(leaves: list[jax.Array], wanted: Sequence[Place], there: jax.sharding.Mesh) -> list[jax.Array]:
    now = leaves[0].sharding
    if now.device_set == set(there.devices.flat):
        return sync(leaves, to=tuple(wanted))
    # To other devices. Where they are as many, each sends the very part that another one takes.
    before: list[tuple[str, jax.sharding.Sharding]] = [
        (dtype, leaf.sharding) for leaf, (dtype, _) in zip(leaves, wanted, strict=True)
    ]
    mesh = now.mesh if isinstance(now, jax.sharding.NamedSharding) else None
    if isinstance(mesh, jax.sharding.Mesh) and mesh.size == there.size:
        devices = mesh.devices.reshape(there.devices.shape)
        here = jax.sharding.Mesh(devices, there.axis_names, axis_types=there.axis_types)
        before = [(dtype, jax.sharding.NamedSharding(here, place.spec)) for dtype, place in wanted]
    return jax.device_put(sync(leaves, to=tuple(before)), [place for _, place in wanted])


def _to_own(params: Params, model: ModelDef, own: jax.sharding.Mesh) -> Params:
    """From the mesh of all processes to this one's part of it: every process gets a copy, laid out as its sampler's."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    everyone = _everyone(own, leaves[0][1].sharding.mesh)
    places = jax.tree.leaves(param_shardings(model, everyone))
    wanted = tuple(
        (narrower(leaf, compute_type(model, path)), place) for (path, leaf), place in zip(leaves, places, strict=True)
    )
    copies = sync([leaf for _, leaf in leaves], to=wanted)
    shardings = [jax.sharding.NamedSharding(own, place.spec) for place in places]
    return jax.tree.unflatten(tree, [_join(copy, there) for copy, there in zip(copies, shardings, strict=True)])


def to_trainer(array: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
    """Take an array of the sampler's back to the trainer's mesh."""
    there = array.sharding
    if jax.process_count() == 1 or not array.is_fully_addressable:
        return jax.device_put(array, place)
    assert isinstance(there, jax.sharding.NamedSharding) and isinstance(place, jax.sharding.NamedSharding)
    assert isinstance(there.mesh, jax.sharding.Mesh) and isinstance(place.mesh, jax.sharding.Mesh)
    everyone = jax.sharding.NamedSharding(_everyone(there.mesh, place.mesh), there.spec)
    return sync([_join(array, everyone)], to=((array.dtype.name, place),))[0]


def _everyone(own: jax.sharding.Mesh, whole: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The samplers' meshes of all processes, one behind the other on an axis of their own."""
    count = jax.process_count()
    each = [[d for d in whole.devices.flat if d.process_index == index] for index in range(count)]
    devices = np.array(each).reshape(count, *own.devices.shape)
    return jax.sharding.Mesh(devices, ("process", *own.axis_names), axis_types=(own.axis_types[0], *own.axis_types))


def _join(array: jax.Array, place: jax.sharding.NamedSharding) -> jax.Array:
    """The same parts of this process's devices, as an array of another mesh."""
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, place, parts)


@partial(jax.jit, static_argnames=("to",))
def sync(leaves: list[jax.Array], *, to: tuple[tuple[str, jax.sharding.Sharding], ...]) -> list[jax.Array]:
    """Cast and reshard arrays, each to its place."""
    return [
        jax.lax.with_sharding_constraint(leaf.astype(dtype), place)
        for leaf, (dtype, place) in zip(leaves, to, strict=True)
    ]


def narrower(leaf: jax.Array | jax.ShapeDtypeStruct, dtype: str | None) -> str:
    """The type in which the sampler reads a parameter: its own, or the compute type where that is narrower."""
    kept = leaf.dtype.name
    return kept if dtype is None or jax.numpy.dtype(dtype).itemsize > leaf.dtype.itemsize else dtype


def _lies(leaf: jax.Array, place: Place) -> bool:
    dtype, sharding = place
    return leaf.dtype.name == dtype and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
