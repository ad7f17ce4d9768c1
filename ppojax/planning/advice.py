"""What to change in a run that needs too much memory: every change is tried on the formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ppojax.config import Config
from ppojax.errors import PpojaxError
from ppojax.mesh import MeshConfig
from ppojax.models.lora import LoRAConfig
from ppojax.models.settings import CutCritic
from ppojax.planning.memory import memory_of_step, mesh_of
from ppojax.planning.models import models_of
from ppojax.planning.planner import Assumed, Report, check_divides
from ppojax.planning.targets import Target
from ppojax.planning.workload import workload_of

CRITIC_LAYERS = 4
RANK = 32


class Change(NamedTuple):
    """Settings, as on the command line, and the memory of a device that the run should then need."""

    settings: str
    bytes: float


def advise(report: Report, assumed: Assumed, count: int = 3) -> list[Change]:
    """Find the changes after which a run should need least memory.

    The peak that was planned shrinks as the formula's does with each change. What does not change what is learnt
    comes first: other meshes, smaller parts, less kept; then a smaller critic, shorter rows and adapters.
    """
    before, planned = _peak(report.config, assumed), report.peak[1].total
    found: dict[bool, list[Change]] = {False: [], True: []}
    for settings, config, other in _changes(report.config, report.target):
        try:
            peak = None if list(config.contradictions()) else _peak(config, assumed)
        except PpojaxError:  # of a mesh that does not divide the model
            peak = None
        if peak is not None and peak < 0.99 * before:
            found[other].append(Change(settings, planned * peak / before))
    ranked = [sorted(changes, key=lambda change: change.bytes) for changes in (found[False], found[True])]
    # One of each first: two sizes of the same change are not two changes.
    return [change for changes in ranked for change in _one_of_each(changes)][:count]


def _one_of_each(changes: list[Change]) -> list[Change]:
    kinds = {change.settings.partition("=")[0]: change for change in reversed(changes)}
    return sorted(kinds.values(), key=lambda change: change.bytes)


def _peak(config: Config, assumed: Assumed) -> float:
    models = models_of(config)
    check_divides(config, models)
    work = workload_of(
        config, prompt_tokens=assumed.prompt_tokens, row_tokens=assumed.row_tokens, segments=assumed.segments
    )
    return max(terms.total for terms in memory_of_step(config, models, work).values())


def _with(config: Config, section: str, **changes: Any) -> Config:
    part = dict(config)[section]
    return config.model_copy(update={section: part.model_copy(update=changes)})


def _changes(config: Config, target: Target) -> Iterator[tuple[str, Config, bool]]:
    """Settings, the config with them, and whether they change what is learnt."""
    yield from ((settings, changed, False) for settings, changed in _meshes(config, target))
    update, rollout, model = config.update, config.rollout, config.model
    if model.remat != "full":
        yield "model.remat=full", _with(config, "model", remat="full"), False
    for divisor in (2, 4, 8):
        rows = update.microbatch_rows // divisor
        if rows and update.microbatch_rows % divisor == 0:
            yield f"update.microbatch_rows={rows}", _with(config, "update", microbatch_rows=rows), False
    least = config.mesh.row_shards
    if update.shared_prefix and rollout.group_size > 1 and least < update.microbatch_rows:
        alone = _with(config, "update", microbatch_rows=least, shared_prefix=False)
        yield f"update.shared_prefix=false update.microbatch_rows={least}", alone, False
    slots = rollout.slots or rollout.rows
    for divisor in (2, 4, 8):
        if slots >= divisor:
            yield f"rollout.slots={slots // divisor}", _with(config, "rollout", slots=slots // divisor), False
    if (rollout.dtype or model.dtype) == "float32":
        yield "model.dtype=bfloat16", _with(config, "model", dtype="bfloat16"), False
    critic = config.critic
    if config.actor.offload == "none" and target.chip.platform != "cpu":
        yield "actor.offload=optimizer", _with(config, "actor", offload="optimizer"), False
    if config.advantage.needs_values and critic.offload != "all" and target.chip.platform != "cpu":
        yield "critic.offload=all", _with(config, "critic", offload="all"), False
    if mesh_of(config, "actor").data > 1 and not config.actor.optimizer.over_data:
        spread = config.actor.optimizer.model_copy(update={"over_data": True})
        yield "actor.optimizer.over_data=true", _with(config, "actor", optimizer=spread), False
    if config.advantage.needs_values and critic.lora is None:
        settings = f"critic.model.type=cut critic.model.layers={CRITIC_LAYERS}"
        yield settings, _with(config, "critic", model=CutCritic(layers=CRITIC_LAYERS)), True
    if model.lora is None:
        adapted = _with(config, "model", lora=LoRAConfig(rank=RANK), base_dtype="bfloat16")
        yield f"model.lora.rank={RANK} model.base_dtype=bfloat16", adapted, True
    shorter, turn = rollout.max_tokens // 2, min(rollout.max_turn_tokens, rollout.max_tokens // 4)
    settings = f"rollout.max_tokens={shorter}"
    settings += f" rollout.max_turn_tokens={turn}" if turn < rollout.max_turn_tokens else ""
    yield settings, _with(config, "rollout", max_tokens=shorter, max_turn_tokens=turn), True


def _meshes(config: Config, target: Target) -> Iterator[tuple[str, Config]]:
    """More fsdp or tensor: of what replicates now, of idle devices, or of a larger target."""
    mesh = config.mesh
    for axis in ("fsdp", "tensor", "expert"):
        if axis == "expert" and mesh.expert == 1:
            continue
        for times in (2, 4, 8):
            moved = min(times, mesh.data) if mesh.data % min(times, mesh.data) == 0 else 1
            size = {"data": mesh.data // moved, axis: mesh.axis_size(axis) * times}
            wider = mesh.model_copy(update=size)
            changed = _fitted(config.model_copy(update={"mesh": wider}), wider)
            sampling, more = config.rollout.mesh, wider.size // mesh.size
            if sampling is not None and config.rollout.devices == "shared" and more > 1:
                own = sampling.model_copy(update={"data": sampling.data * more})
                changed = _with(changed, "rollout", mesh=own)
            settings = f"mesh.{axis}={wider.axis_size(axis)}" + (f" mesh.data={wider.data}" if moved > 1 else "")
            if changed.rollout.mesh != config.rollout.mesh and changed.rollout.mesh is not None:
                settings += f" rollout.mesh.data={changed.rollout.mesh.data}"
            if changed.update.microbatch_rows != config.update.microbatch_rows:
                settings += f" update.microbatch_rows={changed.update.microbatch_rows}"
            if wider.size > target.size:
                settings += f" on {wider.size} devices"
            yield settings, changed


def _fitted(config: Config, mesh: MeshConfig) -> Config:
    """Raise the rows of a microbatch to what the mesh can split, groups that share a prompt whole."""
    rows, unit = config.update.microbatch_rows, mesh.row_shards
    unit *= config.rollout.group_size if config.update.shared_prefix else 1
    return config if rows % unit == 0 else _with(config, "update", microbatch_rows=-(-rows // unit) * unit)
