"""Meshes: from a config to `jax.sharding.Mesh`, and from logical axes to mesh axes.

Every jitted step takes a mesh, on one device too. Parameters declare logical axes ("embed", "heads", ...) where they
are created; the one table below says over which mesh axis each is split. Axis types are `Auto`: XLA propagates the
shardings of arguments, and results that stay (parameters, optimizer state) are pinned.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ppojax.component import Component
from ppojax.errors import ConfigError
from ppojax.lazy import jax
from ppojax.transfer import put

# From the outside in: neighbours on the last axis are next to each other, and it talks most.
AXES = ("data", "fsdp", "expert", "tensor")

# Rows go over data, fsdp and expert together; a parameter is split over fsdp along the model width and over tensor
# along whatever is independent between devices: heads, hidden units of the MLP, vocabulary. Experts are split over
# expert, where tokens travel to them; all else is replicated there, as over data.
RULES: Mapping[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp", "expert"),
    "experts": ("expert",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
}


# Of an optimizer that is spread over data too, the moments: there they are needed in the update only, where each device
# makes its part of the new parameters (ZeRO stage 1, arXiv 1910.02054).
SPREAD: Mapping[str, tuple[str, ...]] = {**RULES, "embed": ("fsdp", "data")}


class MeshConfig(Component):
    """Devices along each mesh axis; their product is the number of devices used."""

    data: int = Field(default=1, ge=1, description="devices over which rows are split, parameters replicated")
    fsdp: int = Field(default=1, ge=1, description="devices over which rows and parameters are split")
    expert: int = Field(default=1, ge=1, description="devices over which rows and the experts of a MoE are split")
    tensor: int = Field(default=1, ge=1, description="devices over which heads, ffn and vocabulary are split")

    @property
    def shape(self) -> tuple[int, ...]:
        """Devices along each of `AXES`."""
        return self.data, self.fsdp, self.expert, self.tensor

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def row_shards(self) -> int:
        """Number of parts into which the rows of a batch are split."""
        return self.data * self.fsdp * self.expert

    def axis_size(self, axis: str) -> int:
        """Devices along one axis, by name."""
        return self.shape[AXES.index(axis)]

    def build(self, after: int = 0) -> jax.sharding.Mesh:
        """Lay out the first `size` devices as a mesh, those `after` as many others.

        Raises:
            ConfigError: there are fewer devices than the mesh asks for.
        """
        devices = jax.devices()[after:]
        if after and self.size > len(devices):
            raise ConfigError(
                f"rollout.mesh {'x'.join(map(str, self.shape))} ({' x '.join(AXES)}) needs {self.size} devices beside "
                f"the trainer's {after}, {len(devices)} more found: make mesh or rollout.mesh smaller, or set "
                "rollout.devices=shared"
            )
        if self.size > len(devices):
            raise ConfigError(
                f"mesh {'x'.join(map(str, self.shape))} ({' x '.join(AXES)}) needs {self.size} devices, "
                f"{len(devices)} found: make the product of mesh.{', mesh.'.join(AXES[:-1])} and mesh.{AXES[-1]} "
                f"at most {len(devices)}"
            )
        each = set(Counter(device.process_index for device in devices).values())
        if len(each) > 1:
            raise ConfigError(
                f"processes have different numbers of devices ({', '.join(map(str, sorted(each)))}): start all with as "
                "many"
            )
        if jax.process_count() > 1 and self.size != len(devices):
            raise ConfigError(
                f"mesh {'x'.join(map(str, self.shape))} ({' x '.join(AXES)}) has {self.size} devices, "
                f"{jax.process_count()} processes have {len(devices)}, and none may be left out: make the product of "
                f"mesh.{', mesh.'.join(AXES[:-1])} and mesh.{AXES[-1]} {len(devices)}"
            )
        types = (jax.sharding.AxisType.Auto,) * len(AXES)
        return jax.make_mesh(self.shape, AXES, axis_types=types, devices=devices[: self.size])

    def rearrange(self, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
        """Lay the devices of another mesh of this size out as this one, in the same order."""
        return jax.sharding.Mesh(mesh.devices.reshape(self.shape), AXES, axis_types=mesh.axis_types)

    def check_divides(
        self, sizes: Mapping[str, int], key: str = "mesh", rules: Mapping[str, tuple[str, ...]] = RULES
    ) -> list[str]:
        """Name each logical dimension that its mesh axes do not divide, with the legal sizes (empty when all do)."""
        faults = []
        for name, size in sizes.items():
            axes = rules[name.split()[0]]
            parts = 1
            for axis in axes:
                parts *= self.axis_size(axis)
            if size % parts:
                legal = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
                split = " x ".join(f"{key}.{axis}" for axis in axes)
                faults.append(f"{split} = {parts} does not divide {name} = {size}; legal: {legal}")
        return faults


def sharding(
    mesh: jax.sharding.Mesh, logical: tuple[str | None, ...], rules: Mapping[str, tuple[str, ...]] = RULES
) -> jax.sharding.NamedSharding:
    """Turn the logical axes of an array into its sharding; axes without a rule are replicated."""
    spec = [rules.get(name) if name else None for name in logical]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["rows"])


def assert_even(what: str, count: int, mesh: jax.sharding.Mesh | None) -> None:
    """Assert that what goes over the rows' axes splits evenly.

    XLA would fill it up, and where a dimension of the other operand lies over `tensor` its filler has been found in the
    gradient of an embedding (jax 0.10.2, on CPU).
    """
    shards = 1 if mesh is None else row_shards(mesh)
    assert count % shards == 0, f"{count} {what} do not split over {shards} devices"


def own_part(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The part of a mesh that is this process's devices; the whole one where there is one process.

    Raises:
        ConfigError: they are no box in it.
    """
    if jax.process_count() == 1:
        return mesh
    try:
        devices = mesh.local_mesh.devices
    except ValueError as fault:
        shape = "x".join(map(str, mesh.devices.shape))
        raise ConfigError(
            f"mesh {shape} ({' x '.join(AXES)}): the {len(jax.local_devices())} devices of a process are no box in it; "
            f"make its outer axes fill the {jax.process_count()} processes, such as mesh.data={jax.process_count()}"
        ) from fault
    return jax.sharding.Mesh(devices, AXES, axis_types=mesh.axis_types)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The sharding of a value that every device holds whole."""
    return sharding(mesh, ())


def shard_rows(tree: Any, mesh: jax.sharding.Mesh, axis: int = 0) -> Any:
    """Put host arrays on the mesh, split along their row axis; arrays without that axis are replicated."""

    def place(x: Any) -> jax.Array:
        logical = (None,) * axis + ("rows",) if x.ndim > axis else ()
        return put(x, sharding(mesh, logical))

    return jax.tree.map(place, tree)
