"""Which meshes cannot lay out which shapes, and which cannot stand beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from ppojax.mesh import AXES, RULES, SPREAD, MeshConfig
from ppojax.models.settings import CutCritic, FreshSpec
from ppojax.settings import Contradiction

if TYPE_CHECKING:
    from ppojax.config.root import Config


def meshes(config: Config) -> Iterator[Contradiction]:
    """List what is wrong with the sampler's and the critics' meshes."""
    fresh, sampling, reading = config.model.fresh, config.rollout.mesh, critic_mesh(config)
    if sampling is not None:
        if config.rollout.devices == "shared":
            yield from _same_devices(config, sampling, "rollout.mesh", "the sampler's", " or rollout.devices=own")
        if fresh is not None:
            yield from split(sampling, "rollout.mesh", fresh, "model.fresh")
    if reading is not None:
        yield from _same_devices(config, reading, "critic.mesh", "the critics'")
        if fresh is not None and isinstance(config.critic.model, CutCritic):
            yield from split(reading, "critic.mesh", fresh, "model.fresh")


def critic_mesh(config: Config) -> MeshConfig | None:
    """The mesh that critics have for themselves; None where there are no critics, too."""
    return config.critic.mesh if config.advantage.needs_values else None


def _same_devices(
    config: Config, mesh: MeshConfig, where: str, whose: str, or_else: str = ""
) -> Iterator[Contradiction]:
    if mesh.size != config.mesh.size:
        yield Contradiction(
            tuple(f"{key}.{axis}" for key in (where, "mesh") for axis in AXES),
            f"{whose} mesh has {mesh.size} devices and the trainer's {config.mesh.size}, and they are to be the same",
            f"make the product of {where} {config.mesh.size}, or set {where}=null{or_else}",
        )


def split(mesh: MeshConfig, where: str, shape: FreshSpec, key: str) -> Iterator[Contradiction]:
    """List the dimensions of a shape that a mesh does not divide."""
    sizes = [
        ("fsdp", mesh.fsdp, shape.width, "width"),
        ("tensor", mesh.tensor, shape.heads, "heads"),
        ("tensor", mesh.tensor, shape.kv_heads, "kv_heads"),
        ("tensor", mesh.tensor, shape.ffn, "ffn"),
    ]
    if shape.moe is not None:
        sizes.append(("tensor", mesh.tensor, shape.moe.ffn, "moe.ffn"))
        sizes.append(("expert", mesh.expert, shape.moe.experts, "moe.experts"))
    for axis, parts, size, name in sizes:
        if size % parts:
            yield Contradiction(
                (f"{where}.{axis}", f"{key}.{name}"),
                f"{name} is split over {where}.{axis} and does not divide",
                f"{where}.{axis} may be {divisors(size)}",
            )


def undivided(config: Config, sizes: Mapping[str, int], who: Literal["actor", "critic"]) -> list[str]:
    """List what of a model, by its logical dimensions, is not divided by the meshes of the actor, or of critics."""
    optimizer = config.actor.optimizer if who == "actor" else config.critic.optimizer
    meshes: dict[str, MeshConfig | None] = {"mesh": config.mesh}  # where it learns stands first
    if who == "actor":
        meshes["rollout.mesh"] = config.rollout.mesh
    elif config.critic.mesh is not None:
        meshes = {"critic.mesh": config.critic.mesh}
    faults = [fault for key, mesh in meshes.items() if mesh is not None for fault in mesh.check_divides(sizes, key)]
    if optimizer.over_data:
        key, mesh = next(iter(meshes.items()))
        assert mesh is not None
        faults += mesh.check_divides({f"embed ({who}.optimizer.over_data)": sizes["embed"]}, key, SPREAD)
    return faults


def uneven(config: Config, rows: int) -> Iterator[Contradiction]:
    """Say so where the rows of a microbatch, of the `rows` of a minibatch, do not split over a mesh."""
    for where, mesh in (("mesh", config.mesh), ("critic.mesh", critic_mesh(config))):
        if mesh is not None and config.update.microbatch_rows % mesh.row_shards:
            yield Contradiction(
                ("update.microbatch_rows", *(f"{where}.{axis}" for axis in RULES["rows"])),
                f"the rows of a microbatch are not split evenly over {mesh.row_shards} devices",
                f"update.microbatch_rows may be {divisors(rows, mesh.row_shards)}",
            )


def idle(config: Config, rows: int) -> Iterator[Contradiction]:
    """Say so where the prompts of a microbatch, each read once for its group, do not split over a mesh."""
    group, prompts = config.rollout.group_size, config.update.microbatch_rows // config.rollout.group_size
    for where, mesh in (("mesh", config.mesh), ("critic.mesh", critic_mesh(config))):
        if mesh is not None and prompts % mesh.row_shards:
            yield Contradiction(
                ("update.microbatch_rows", "rollout.group_size", *(f"{where}.{axis}" for axis in RULES["rows"])),
                f"rows that share a prompt stay on one device, and the {prompts} groups of a microbatch are not split "
                f"evenly over {mesh.row_shards} devices",
                f"update.microbatch_rows may be {divisors(rows, group * mesh.row_shards)}, or set "
                "update.shared_prefix=false",
            )


def divisors(n: int, multiple_of: int = 1) -> str:
    """List the divisors of n that are multiples of a number: `1, 2, 4`."""
    found = [d for d in range(1, n + 1) if n % d == 0 and d % multiple_of == 0]
    return ", ".join(map(str, found)) or f"nothing: make {n} a multiple of {multiple_of}"
