"""Load a model: where its weights and its tokenizer come from."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from ppojax.models.chat import ChatTemplate
from ppojax.models.forward import ModelDef, Params, init, with_adapters
from ppojax.models.parameters import check_targets
from ppojax.models.settings import ModelConfig
from ppojax.models.source import find_source
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer import Tokenizer, char_tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model and its weights: float32, or the base's type where they are frozen."""

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
        ConfigError: a target of the adapters is no matrix of this model.
    """
    dtype = "float32" if config.lora is None else config.base_dtype
    if config.path is None:
        assert config.fresh is not None
        tokenizer = char_tokenizer(string.printable[:95] + "\n")
        spec = config.fresh.decoder(tokenizer.vocab_size)
        model = ModelDef(spec, config.dtype, config.remat, attention=config.attention, statistics=config.statistics)
        params = init(model, key)
    else:
        spec, params, tokenizer = read_pretrained(config.path, mesh, check, dtype, config.chat_template)
        model = ModelDef(spec, config.dtype, config.remat, attention=config.attention, statistics=config.statistics)
    if config.lora is not None:
        check_targets(spec, config.lora, "model.lora")
        model = replace(model, lora=config.lora)
        params = with_adapters(model, params, dtype, jax.random.fold_in(key, 1))
    return Loaded(model, params, tokenizer)


def read_pretrained(
    path: str,
    mesh: jax.sharding.Mesh | None = None,
    check: Callable[[ModelDef], None] | None = None,
    dtype: str = "float32",
    chat_template: str | ChatTemplate = "auto",
) -> tuple[DecoderSpec, Params, Tokenizer]:
    """Read weights and tokenizer from `smollm2`, a GGUF file, a Hugging Face folder, or a hub id.

    Args:
        mesh: where the weights go, each device its part; None: all on one device.
        check: called with the model before its weights are read.
        dtype: type in which the weights are kept.
        chat_template: the tokenizer's, or which one to choose (see `variants.choose_template`).
    """
    source = find_source(path)
    if check is not None:
        check(ModelDef(source.spec))
    tokenizer = source.tokenizer(chat_template)  # its faults show before the weights are read
    return source.spec, source.place(dtype, mesh), tokenizer
