"""The models of a run as shapes: actor and critics, and how much of them each device of a mesh holds."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ppojax.config import Config
from ppojax.mesh import RULES, MeshConfig
from ppojax.models import parameters
from ppojax.models.critic import cut_spec
from ppojax.models.forward import ModelDef
from ppojax.models.parameters import Leaf
from ppojax.models.settings import CriticModelConfig, CutCritic, FreshCritic
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer import char_tokenizer
from ppojax.planning.shapes import shape_of


class Models(NamedTuple):
    """The policy, and the critics where advantages need values; without a mesh."""

    actor: ModelDef
    critic: ModelDef | None


def models_of(config: Config) -> Models:
    """The models that a config describes, without their weights.

    Raises:
        ConfigError, DataError: a shape is not known, see `ppojax.planning.shapes.shape_of`.
    """
    settings = config.model
    if settings.path is None:
        assert settings.fresh is not None
        spec = settings.fresh.decoder(char_tokenizer(string.printable[:95] + "\n").vocab_size)
    else:
        spec = shape_of(settings.path, "model.path")
    actor = ModelDef(
        *(spec, settings.dtype, settings.remat),
        attention=settings.attention,
        statistics=settings.statistics,
        lora=settings.lora,
    )
    if not config.advantage.needs_values:
        return Models(actor, None)
    critic = config.critic
    trunk = _trunk(critic.model, spec)
    return Models(actor, replace(actor, spec=trunk, head=critic.head, count=critic.count, lora=critic.lora))


def _trunk(settings: CriticModelConfig, actor: DecoderSpec) -> DecoderSpec:
    if isinstance(settings, CutCritic):
        return cut_spec(actor, settings.layers)
    if isinstance(settings, FreshCritic):
        return settings.shape.decoder(actor.vocab)
    spec = shape_of(settings.path, "critic.model.path")
    return cut_spec(spec, spec.layers)


class Weights(NamedTuple):
    """Numbers that a device holds of a model's parameters."""

    trained: float
    frozen: float

    @property
    def all(self) -> float:
        return self.trained + self.frozen


def weights_of(model: ModelDef, mesh: MeshConfig | None = None) -> Weights:
    """Parameters of a model, of all its critics, on one device of a mesh; in all without one."""
    held = {True: 0.0, False: 0.0}
    for leaf, times, trained in _leaves(model):
        size = math.prod(leaf.shape) if mesh is None else local(leaf, mesh)
        held[trained] += times * size * (model.count if trained else 1)
    return Weights(held[True], held[False])


def local(leaf: Leaf, mesh: MeshConfig) -> float:
    """Numbers of one parameter on one device, by `ppojax.mesh.RULES`."""
    parts = [mesh.axis_size(axis) for name in leaf.axes if name is not None for axis in RULES.get(name, ())]
    return math.prod(leaf.shape) / math.prod(parts)


def _leaves(model: ModelDef) -> Iterator[tuple[Leaf, int, bool]]:
    """Every kind of parameter, how often it is there, and whether it is trained."""
    spec, whole = model.spec, model.lora is None
    yield parameters.embedding(spec), 1 if spec.tied else 2, whole
    yield parameters.norm(spec, spec.width), 1, whole
    for experts, layers in ((True, spec.moe_layers), (False, spec.layers - spec.moe_layers)):
        if layers == 0:
            continue
        for leaf in parameters.block(spec, experts).values():
            yield leaf, layers, whole
        if model.lora is not None:
            for pair in parameters.adapters(spec, experts, model.lora).values():
                yield pair["a"], layers, True
                yield pair["b"], layers, True
    if model.head is not None:
        yield Leaf((spec.width + 1, model.head.outputs), (None, None)), 1, True
