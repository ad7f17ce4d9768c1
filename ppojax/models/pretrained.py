"""Load a model: where its weights and its tokenizer come from."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from ppojax.errors import DataError
from ppojax.models.critic import cut_spec, cut_trunk, new_head
from ppojax.models.forward import ModelDef, Params, init, stack
from ppojax.models.settings import CriticModelConfig, CutCritic, FreshCritic, ModelConfig
from ppojax.models.source import find_source
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer import Tokenizer, char_tokenizer
from ppojax.models.value_head import LinearHead, ValueHead

LINEAR = LinearHead()


@dataclass(frozen=True)
class Loaded:
    """A model and its float32 weights."""

    model: ModelDef
    params: Params
    tokenizer: Tokenizer


def load_model(
    config: ModelConfig,
    key: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
    check: Callable[[ModelDef], None] | None = None,
) -> Loaded:
    """Load pretrained weights, or draw fresh ones.

    Args:
        mesh: where pretrained weights go, each device its part; None: all on one device.
        check: called with the model before its weights are read.

    Raises:
        DataError: the weights are missing or malformed, or the tokenizer has more ids than the embedding has rows.
    """
    if config.path is None:
        assert config.fresh is not None
        tokenizer = char_tokenizer(string.printable[:95] + "\n")
        spec = config.fresh.decoder(tokenizer.vocab_size)
        model = ModelDef(spec, config.dtype, config.remat, attention=config.attention)
        return Loaded(model, init(model, key), tokenizer)
    spec, params, tokenizer = read_pretrained(config.path, mesh, check)
    return Loaded(ModelDef(spec, config.dtype, config.remat, attention=config.attention), params, tokenizer)


def read_pretrained(
    path: str, mesh: jax.sharding.Mesh | None = None, check: Callable[[ModelDef], None] | None = None
) -> tuple[DecoderSpec, Params, Tokenizer]:
    """Read weights and tokenizer from `smollm2`, a GGUF file, a Hugging Face folder, or a hub id.

    Args:
        mesh: where the weights go, each device its part; None: all on one device.
        check: called with the model before its weights are read.
    """
    source = find_source(path)
    if check is not None:
        check(ModelDef(source.spec))
    return source.spec, source.place("float32", mesh), source.tokenizer()


def load_critic(
    config: CriticModelConfig,
    actor: Loaded,
    key: jax.Array,
    head: ValueHead = LINEAR,
    count: int = 1,
    noise: float = 0.0,
) -> tuple[ModelDef, Params]:
    """Make the critics' model: cut from the actor, pretrained, or fresh, with a value head that starts at zero.

    Critics of an ensemble start from the same trunk, fresh ones from their own. Each has its own noise on its head:
    normal, with a deviation of `noise` / sqrt(D), so that values differ by about `noise` for states of unit scale.

    Raises:
        DataError: the critic's tokenizer is not the actor's, or more layers are cut than the actor has.
    """
    spec, trunk = _trunk(config, actor)
    model = replace(actor.model, spec=spec, head=head, count=count)
    if trunk is None:
        params = init(model, key)
    else:
        one = {"trunk": trunk, "value_head": new_head(spec, head)}
        params = one if count == 1 else stack([one] * count)
    if count > 1:
        drawn = jax.random.normal(jax.random.fold_in(key, 1), (count, spec.width, head.outputs), "float32")
        params["value_head"] = params["value_head"].at[:, :-1].add(noise / math.sqrt(spec.width) * drawn)
    return model, params


def _trunk(config: CriticModelConfig, actor: Loaded) -> tuple[DecoderSpec, Params | None]:
    """Where a critic's trunk comes from; None for one that is drawn."""
    if isinstance(config, CutCritic):
        if config.layers > actor.model.spec.layers:
            raise DataError(f"critic.model.layers = {config.layers}, the actor has {actor.model.spec.layers} layers")
        return cut_spec(actor.model.spec, config.layers), cut_trunk(actor.model.spec, actor.params, config.layers)
    if isinstance(config, FreshCritic):
        return config.shape.decoder(actor.model.spec.vocab), None
    spec, params, tokenizer = read_pretrained(config.path)
    if tokenizer.fingerprint() != actor.tokenizer.fingerprint():
        raise DataError(f"critic.model.path {config.path}: its tokenizer is not the actor's; they must be the same")
    return cut_spec(spec, spec.layers), cut_trunk(spec, params, spec.layers)
