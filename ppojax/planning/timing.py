"""What a device does in each part of a step: FLOPs by formula, bytes of its memory, bytes sent to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ppojax.config import Config
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef
from ppojax.planning.collectives import Collective
from ppojax.planning.costs import Axes, Work, forward_flops, mfu, seconds
from ppojax.planning.memory import OPTIMIZER, SCORES, WIDTH, cache_bytes, mesh_of, own_mesh
from ppojax.planning.models import Models, weights_of
from ppojax.planning.targets import Target
from ppojax.planning.workload import Workload, passes_of

Sent = dict[Axes, float]
Calls = tuple[float, Sequence[Collective]]


class Part(NamedTuple):
    """A part of a step: `flops` by formula, of all devices together; what one device does; and how long it takes."""

    flops: float
    work: Work
    seconds: float


class Speed(NamedTuple):
    """What a step comes to."""

    parts: Mapping[str, Part]
    step_s: float
    tokens_per_device: float  # a second: of rows, prompts among them
    mfu: float
    mfu_actor: float  # of the policy's update alone, as `perf/mfu` in the log


def speed_of(
    config: Config,
    models: Models,
    work: Workload,
    target: Target,
    compiled: Mapping[str, Calls] | None = None,
) -> Speed:
    """Time of a step and of its parts.

    Bytes that are sent are by formula, or those of compiled programs: by name, how often each is called in a step, and
    the collectives of a call.
    """
    doing = {
        "gen": _generation(config, models.actor, work),
        "score": _scoring(config, models, work),
        "actor": _update(config, models.actor, work, config.update.epochs),
    }
    if models.critic is not None:
        passes = config.update.epochs * config.critic.updates
        doing["critic"] = _update(config, models.critic, work, passes)
    if compiled is not None:
        sent = _sent(work, compiled)
        doing = {name: (flops, does._replace(sent=sent[name])) for name, (flops, does) in doing.items()}
    parts = {
        name: Part(*doing[name], seconds(doing[name][1], target, mesh_of(config, name)))
        for name in ("gen", "score", "critic", "actor")
        if name in doing
    }
    step, own = sum(part.seconds for part in parts.values()), own_mesh(config)
    devices, chip, actor = config.mesh.size, target.chip, parts["actor"]
    if own is not None:
        playing, devices = parts["gen"].seconds, devices + own.size
        step = max(playing, step - playing) if config.rollout.mode == "one_step_off" else step
    return Speed(
        parts,
        step,
        work.rows * work.tokens / step / devices,
        mfu(sum(part.flops for part in parts.values()), step, devices, chip),
        mfu(actor.flops, actor.seconds, config.mesh.size, chip),
    )


def _mesh(config: Config, model: ModelDef) -> MeshConfig:
    return mesh_of(config, "actor" if model.head is None else "critic")


def _generation(config: Config, actor: ModelDef, work: Workload) -> tuple[float, Work]:
    """Prompts once for their group, what the environment says for each row, and a pass for each token."""
    spec, mesh, rows = actor.spec, config.rollout.mesh or config.mesh, work.rows
    width = WIDTH[config.rollout.dtype or config.model.dtype]
    observed = rows * (work.tokens - work.prompt - work.written)
    read = config.rollout.prompts * work.prompt + observed
    reading = forward_flops(spec, read, read * work.positions, 0)
    passes = passes_of(work)
    writing = forward_flops(spec, work.slots, work.slots * work.positions, work.slots) * passes
    weights = width * weights_of(actor, mesh.model_copy(update={"fsdp": 1})).all
    moved = passes * (weights + cache_bytes(config, spec, work))
    sent = _forward_sent(actor, mesh, width, work.slots / mesh.row_shards)
    flops = reading + writing
    return flops, Work(flops / mesh.size, moved, {axes: passes * size for axes, size in sent.items()})


def _scoring(config: Config, models: Models, work: Workload) -> tuple[float, Work]:
    """A forward pass of each model that scores the rows."""
    asked = sum(bool(config.needs & names) for names in ({"logp_old"}, {"logp_ref", "hidden_ref"}))
    read: list[tuple[ModelDef, int]] = [(models.actor, asked)]
    if models.critic is not None:
        read.append((models.critic, models.critic.count))
    flops, moved, sent = 0.0, 0.0, {}
    for model, times in read:
        scored = work.rows * work.actions if model.head is None else 0
        flops += times * forward_flops(model.spec, work.read(work.rows), work.pairs(work.rows), scored)
        moved += times * _moved(config, model, work, 1)
        _join(sent, _row_sent(config, model, work, 1), times)
    return flops, Work(flops / config.mesh.size, moved, sent)


def _update(config: Config, model: ModelDef, work: Workload, epochs: int) -> tuple[float, Work]:
    """Forward and backward passes, again forward where blocks are computed twice, and the optimizer's."""
    mesh, times = _mesh(config, model), epochs * model.count
    scored = work.rows * work.actions if model.head is None else 0
    forward = times * forward_flops(model.spec, work.read(work.rows), work.pairs(work.rows), scored)
    again = 1 if model.remat == "full" else 0
    trained, steps = weights_of(model, mesh).trained, epochs * config.update.minibatches
    moved = times * _moved(config, model, work, 3 + again) + 3 * (4 + OPTIMIZER) * trained * steps
    sent: Sent = {}
    _join(sent, _row_sent(config, model, work, 2 + again), times)
    microbatches = times * work.rows / config.update.microbatch_rows
    for axis in ("data", "fsdp", "expert"):
        n = mesh.axis_size(axis)
        if n > 1:
            turns = 1 if axis == "fsdp" else 2  # what is scattered, or summed up everywhere
            share = (n if axis == "fsdp" else 1) * weights_of(model.member, mesh).trained
            _join(sent, {(axis,): turns * WIDTH[model.dtype] * share * (n - 1) / n}, microbatches)
    return 3 * forward, Work((3 + again) * forward / mesh.size, moved, sent)


def _moved(config: Config, model: ModelDef, work: Workload, passes: int) -> float:
    """Bytes of memory: weights for each microbatch, scores and what blocks compute, each written and read."""
    mesh, width, spec = _mesh(config, model), WIDTH[model.dtype], model.spec
    weights = width * weights_of(model.member, mesh.model_copy(update={"fsdp": 1})).all
    microbatches = work.rows / config.update.microbatch_rows
    scores = SCORES * work.pairs(work.rows) * spec.heads / mesh.tensor / mesh.row_shards
    stream = 16 * width * work.read(work.rows) * spec.width / mesh.row_shards
    return passes * (microbatches * weights + spec.layers * (scores + stream))


def _row_sent(config: Config, model: ModelDef, work: Workload, passes: int) -> Sent:
    """Bytes sent by passes over all rows, microbatch by microbatch."""
    rows, mesh = config.update.microbatch_rows, _mesh(config, model)
    one = _forward_sent(model, mesh, WIDTH[model.dtype], work.read(rows) / mesh.row_shards)
    return {axes: size * passes * work.rows / rows for axes, size in one.items()}


def _forward_sent(model: ModelDef, mesh: MeshConfig, width: int, positions: float) -> Sent:
    """Bytes that a device sends in one pass: weights over fsdp, two sums a block over tensor, tokens to experts."""
    spec, sent = model.spec, {}
    if mesh.fsdp > 1:
        whole = weights_of(model.member, mesh.model_copy(update={"fsdp": 1})).all
        sent[("fsdp",)] = width * whole * (mesh.fsdp - 1) / mesh.fsdp
    if mesh.tensor > 1:
        sent[("tensor",)] = 4 * spec.layers * width * positions * spec.width * (mesh.tensor - 1) / mesh.tensor
    if mesh.expert > 1 and spec.moe is not None:
        travels = positions * spec.moe.chosen * spec.width * (mesh.expert - 1) / mesh.expert
        sent[("expert",)] = 2 * spec.moe_layers * width * travels
    return sent


def _sent(work: Workload, compiled: Mapping[str, Calls]) -> dict[str, Sent]:
    """What the compiled programs send in a step: each as often as it is called."""
    into = {"prefill": "gen", "share": "gen", "extend": "gen", "decode": "gen", "values": "score"}
    out: dict[str, Sent] = {name: {} for name in ("gen", "score", "critic", "actor")}
    for name, (calls, found) in compiled.items():
        for c in found:
            _join(out[into.get(name, name)], {c.axes: c.bytes}, passes_of(work) if c.turn else calls)
    return out


def _join(into: Sent, more: Mapping[Axes, float], times: int | float = 1) -> None:
    for axes, size in more.items():
        into[axes] = into.get(axes, 0.0) + times * size
