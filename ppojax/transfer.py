"""Between the memory of the host and the devices of a mesh, some of which may be other processes'."""

from __future__ import annotations

from typing import Any, TypeVar

from ppojax.lazy import jax

Tree = TypeVar("Tree")


def put(tree: Tree, shardings: Any) -> Tree:
    """Place arrays that every process has whole, and the same, on a mesh (`shardings`: one, or a tree of them).

    As `jax.device_put`, which would first send them to all processes to compare them. What is on the mesh already is
    resharded.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if (isinstance(x, jax.Array) and not x.is_fully_addressable) or sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        host = jax.device_get(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: one(x, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def fetch(tree: Any) -> Any:
    """Copy arrays to the host, whole in every process; all have to call this in the same order."""
    leaves, structure = jax.tree.flatten(tree)
    split = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not _readable(leaf)]
    if split:
        mesh = next(s.mesh for i in split if isinstance(s := leaves[i].sharding, jax.sharding.NamedSharding))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        for i, leaf in zip(split, jax.jit(_same, out_shardings=everywhere)([leaves[i] for i in split]), strict=True):
            leaves[i] = leaf
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _readable(array: jax.Array) -> bool:
    return array.is_fully_addressable or array.is_fully_replicated


def _same(leaves: list[jax.Array]) -> list[jax.Array]:
    return leaves
