"""Memory of one device by arithmetic: what is held all the time, and what each part of a step needs beside it.

It is the whole estimate where nothing can be compiled, and says what a change would save where something can.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ppojax.config import Config
from ppojax.kernels.tiled import tile_rows
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef
from ppojax.models.spec import DecoderSpec
from ppojax.planning.models import Models, weights_of
from ppojax.planning.workload import Workload
from ppojax.rollout.feed import PAIRS, widths

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
SCORES = 16  # bytes a (query, key) pair and head: scores and weights, with what their softmax leaves behind
OPTIMIZER = 8  # bytes a trained parameter: two float32 moments


class Terms(NamedTuple):
    """Bytes of one device at one time of a step."""

    parameters: float = 0.0
    optimizer: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    logits: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return math.fsum(self)


def own_mesh(config: Config) -> MeshConfig | None:
    """The sampler's mesh, where it has devices of its own."""
    return config.rollout.mesh if config.rollout.devices == "own" else None


def mesh_of(config: Config, part: str) -> MeshConfig:
    """The mesh of a part of a step: of the sampler, of the critics, or of all else."""
    own = {"gen": config.rollout.mesh, "critic": config.critic.mesh}.get(part)
    return config.mesh if own is None else own


def held(config: Config, models: Models, part: str = "") -> Terms:
    """What lies on a device all the time: float32 masters, moments, frozen weights, the reference, stale copies.

    Of states that rest in the host's memory, what is on the device in that part of a step; all of them without one.
    """
    parameters = optimizer = 0.0
    for who, model, settings in (("actor", models.actor, config.actor), ("critic", models.critic, config.critic)):
        if model is None:
            continue
        mesh = mesh_of(config, who)
        weights = weights_of(model, mesh)
        over = {"fsdp": mesh.fsdp * mesh.data, "data": 1} if settings.optimizer.over_data else {}
        awake = awake_of(settings.offload, who, part)
        parameters += awake[0] * 4 * weights.trained + WIDTH[config.model.base_dtype] * weights.frozen
        optimizer += awake[1] * OPTIMIZER * weights_of(model, mesh.model_copy(update=over)).trained
    copies = bool(config.needs & {"logp_ref", "hidden_ref"}) + config.rollout.staleness
    return Terms(parameters + copies * 4 * weights_of(models.actor, config.mesh).trained, optimizer)


def awake_of(offload: str, who: str, part: str) -> tuple[bool, bool]:
    """Whether parameters and optimizer state of a model are on the devices in a part of a step."""
    if offload == "none" or part in ("", who):
        return True, True
    return offload != "all" or part == "score", False


def memory_of_step(config: Config, models: Models, work: Workload) -> dict[str, Terms]:
    """Memory of one device while prompts are read, tokens are written, rows are scored, critics and policy learn.

    Held as in `held`. Weights are cast to the compute type as a whole. Attention is XLA's, which keeps scores.
    """
    reading, writing = _generation(config, models.actor, work)
    apart, parts = own_mesh(config) is not None, {}
    base = Terms() if apart else held(config, models, "gen")
    parts["read"], parts["decode"] = (_add(base, extra) for extra in (reading, writing))
    together = config.rollout.mode == "one_step_off" and not apart  # episodes are played all the time

    def beside(part: str) -> Terms:
        base = held(config, models, part)
        return _add(base, reading._replace(activations=0.0)) if together else base

    scored = [m for m in (models.actor if config.needs else None, models.critic) if m is not None]
    if scored:
        most = max((_update(config, m, work, backward=False) for m in scored), key=lambda t: t.total)
        parts["score"] = _add(beside("score"), most)
    if models.critic is not None:
        parts["critic"] = _add(beside("critic"), _update(config, models.critic, work))
    parts["actor"] = _add(beside("actor"), _update(config, models.actor, work))
    return parts


def _add(a: Terms, b: Terms) -> Terms:
    return Terms(*(x + y for x, y in zip(a, b, strict=True)))


def cache_bytes(config: Config, spec: DecoderSpec, work: Workload) -> float:
    """Keys and values of a device's slots."""
    mesh = config.rollout.mesh or config.mesh
    numbers = spec.layers * work.slots * work.positions * spec.kv_heads * (spec.key_width + spec.value_width)
    return WIDTH[config.rollout.dtype or config.model.dtype] * numbers / (mesh.row_shards * mesh.tensor)


def _generation(config: Config, actor: ModelDef, work: Workload) -> tuple[Terms, Terms]:
    """While tokens are read, and while they are written: a block's part of the cache is taken out of it."""
    rollout, spec = config.rollout, actor.spec
    mesh, dtype = rollout.mesh or config.mesh, rollout.dtype or config.model.dtype
    copied = dtype != "float32" or mesh != config.mesh
    weights = WIDTH[dtype] * weights_of(actor, mesh).all if copied else 0.0
    cache = cache_bytes(config, spec, work)
    width = max(widths(work.prompt, rollout.prompt_bucket))
    behind = width + (work.positions if config.env.max_turns > 1 or work.prompt > width else 0)
    rows = min(work.slots, max(PAIRS // (width * behind), 1)) / mesh.row_shards
    reading = rows * width * (SCORES * behind * spec.heads / mesh.tensor + _block(actor, mesh, dtype))
    slots = work.slots / mesh.row_shards
    logits = 3 * 4 * slots * spec.vocab / mesh.tensor
    layer = _gathered(actor, mesh, WIDTH[dtype])
    return Terms(weights, 0, 0, reading + layer, cache), Terms(
        weights, 0, 0, cache / spec.layers + layer, cache, logits
    )


def _gathered(model: ModelDef, mesh: MeshConfig, width: int) -> float:
    """Weights of one block in whole, where they are split over fsdp."""
    whole = weights_of(model.member, mesh.model_copy(update={"fsdp": 1})).all
    return width * whole / model.spec.layers if mesh.fsdp > 1 else 0.0


def _block(model: ModelDef, mesh: MeshConfig, dtype: str) -> float:
    """Bytes a position that one block computes, its scores left out."""
    spec, moe = model.spec, model.spec.moe
    attention = (2 * spec.heads + 2 * spec.kv_heads) * spec.key_width / mesh.tensor
    mlp = 3 * spec.ffn / mesh.tensor if moe is None else moe.chosen * (2 * spec.width + 3 * moe.ffn / mesh.tensor)
    return WIDTH[dtype] * (attention + mlp) + (4 + WIDTH[dtype]) * 2 * spec.width  # norms are float32


def _update(config: Config, model: ModelDef, work: Workload, *, backward: bool = True) -> Terms:
    """While one microbatch is read, forward or forward and backward; members of an ensemble one after another."""
    mesh = mesh_of(config, "actor" if model.head is None else "critic")
    spec, width = model.spec, WIDTH[model.dtype]
    rows = config.update.microbatch_rows
    positions, pairs = work.read(rows) / mesh.row_shards, work.pairs(rows) / mesh.row_shards
    weights = weights_of(model.member, mesh)
    cast = width * weights.all if width < 4 else 0.0
    block = positions * _block(model, mesh, model.dtype)
    scores = SCORES * pairs * spec.heads / mesh.tensor
    logits = 0.0
    if model.head is None:
        scored = rows * work.actions // mesh.row_shards
        vocabulary = spec.vocab // mesh.tensor
        logits = 2 * 4.0 * tile_rows(scored, vocabulary) * vocabulary + (width + 4) * scored * spec.width
    if not backward:
        return Terms(0, 0, 0, cast + block + scores + _gathered(model, mesh, width), 0, logits)
    parts = work.rows // config.update.minibatches // rows
    gradients = 4 * weights.trained * (2 if parts > 1 else 1)
    stream = width * positions * spec.width
    kept = {"full": stream, "none": block + scores}.get(model.remat, stream + block / 2)
    activations = cast + spec.layers * kept + 2 * block + scores + 2 * _gathered(model, mesh, width)
    return Terms(0, 0, gradients, activations, 0, logits)
