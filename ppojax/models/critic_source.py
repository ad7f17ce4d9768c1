"""Where critics come from: cut from the actor, another checkpoint, or nothing; one or several, whole or adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ppojax.errors import DataError
from ppojax.models.critic import cut_spec, cut_trunk, new_head
from ppojax.models.critic_files import StoredCritic, read_critic
from ppojax.models.forward import ModelDef, Params, init, join, with_adapters
from ppojax.models.lora import LoRAConfig, merge, split
from ppojax.models.parameters import check_targets
from ppojax.models.pretrained import Loaded, read_pretrained
from ppojax.models.settings import CriticModelConfig, CutCritic, FittedCritic, FreshCritic
from ppojax.models.spec import DecoderSpec
from ppojax.models.value_head import LinearHead, ValueHead

LINEAR = LinearHead()


@dataclass(frozen=True)
class CriticForm:
    """What is put on a trunk to make it a critic, or several."""

    head: ValueHead = LINEAR
    count: int = 1
    noise: float = 0.0  # see `load_critic`
    lora: LoRAConfig | None = None
    base_dtype: str = "float32"  # of a trunk that is frozen


PLAIN = CriticForm()


def load_critic(
    config: CriticModelConfig, actor: Loaded, key: jax.Array, form: CriticForm = PLAIN
) -> tuple[ModelDef, Params]:
    """Make the critics' model: cut from the actor, pretrained, or fresh, with a value head that starts at zero.

    Critics of an ensemble start from the same trunk, unless they are fresh and trained whole. Each has its own noise
    on its head: normal, with a deviation of `noise` / sqrt(D), so that values differ by about `noise` for states of
    unit scale. A critic with adapters has a frozen trunk, one for all. Cut from an actor with the same kind of adapters
    it starts from those, too; trained whole it starts from the actor with its adapters merged.

    A fitted critic brings its head, too.

    Raises:
        DataError: the critic's tokenizer is not the actor's, its head is of another kind, or more layers are cut than
            the actor has.
        ConfigError: a target of the adapters is no matrix of the critic.
    """
    stored = _stored(config, actor, form) if isinstance(config, FittedCritic) else None
    spec, trunk = _trunk(config, actor, form.lora) if stored is None else (stored.spec, stored.params["trunk"])
    model = replace(actor.model, spec=spec, head=form.head, count=form.count, lora=form.lora)
    if form.lora is not None:
        check_targets(spec, form.lora, "critic.lora")
        if trunk is None:  # frozen, and so one for all
            trunk = init(replace(model, head=None, count=1, lora=None), key)
    head = None if stored is None else stored.params["value_head"]
    if form.count == 1:
        return model, _member(model, trunk, head, form, key)
    keys = jax.random.split(key, form.count)
    return model, join([_member(model.member, trunk, head, form, k) for k in keys], form.lora)


def _stored(config: FittedCritic, actor: Loaded, form: CriticForm) -> StoredCritic:
    stored = read_critic(Path(config.path).expanduser())
    if stored.tokenizer != actor.tokenizer.fingerprint():
        raise DataError(f"critic.model.path {config.path}: its tokenizer is not the actor's; they must be the same")
    if stored.head != form.head:
        raise DataError(f"critic.model.path {config.path}: its head is {stored.head!r}, critic.head is {form.head!r}")
    return stored


def _trunk(config: CriticModelConfig, actor: Loaded, lora: LoRAConfig | None) -> tuple[DecoderSpec, Params | None]:
    """A critic's trunk, with the actor's adapters where they fit; None for one that is drawn."""
    if isinstance(config, CutCritic):
        if config.layers > actor.model.spec.layers:
            raise DataError(f"critic.model.layers = {config.layers}, the actor has {actor.model.spec.layers} layers")
        trunk, theirs = cut_trunk(actor.model.spec, actor.params, config.layers), actor.model.lora
        if theirs is not None and lora is None:
            trunk = merge(trunk, theirs, "float32")
        elif theirs is not None and not theirs.fits(lora):
            # Not merged: a frozen trunk is what a resumed run reads again, whatever the actor has learnt.
            trunk = split(trunk, theirs)[1]
        return cut_spec(actor.model.spec, config.layers), trunk
    assert not isinstance(config, FittedCritic)
    if isinstance(config, FreshCritic):
        return config.shape.decoder(actor.model.spec.vocab), None
    spec, params, tokenizer = read_pretrained(config.path, chat_template=actor.tokenizer.template)
    if tokenizer.fingerprint() != actor.tokenizer.fingerprint():
        raise DataError(f"critic.model.path {config.path}: its tokenizer is not the actor's; they must be the same")
    return cut_spec(spec, spec.layers), cut_trunk(spec, params, spec.layers)


def _member(model: ModelDef, trunk: Params | None, head: Any, form: CriticForm, key: jax.Array) -> Params:
    """One critic, with a head of its own or one that was fitted."""
    decoder = replace(model, head=None, count=1)
    if trunk is None:
        trunk = init(decoder, key)
    elif model.lora is not None and not split(trunk, model.lora)[0]:
        trunk = with_adapters(decoder, trunk, form.base_dtype, jax.random.fold_in(key, 1))
    head = new_head(model.spec, form.head) if head is None else jnp.asarray(head)
    if form.count > 1:
        drawn = jax.random.normal(jax.random.fold_in(key, 2), (model.spec.width, form.head.outputs), head.dtype)
        head = head.at[:-1].add(form.noise / math.sqrt(model.spec.width) * drawn)
    return {"trunk": trunk, "value_head": head}
