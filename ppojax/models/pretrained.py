"""Load a model: where its weights and its tokenizer come from."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

import jax

from ppojax.errors import DataError
from ppojax.models.critic import cut_from_actor
from ppojax.models.forward import ModelDef, Params, init
from ppojax.models.gguf import read_gguf
from ppojax.models.llama import read_hf
from ppojax.models.settings import CriticModelConfig, CutCritic, FreshCritic, ModelConfig
from ppojax.models.smollm2 import find_smollm2
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer import Tokenizer, char_tokenizer
from ppojax.models.tokenizer_files import tokenizer_from_gguf, tokenizer_from_hf

HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


@dataclass(frozen=True)
class Loaded:
    """A model and its float32 weights."""

    model: ModelDef
    params: Params
    tokenizer: Tokenizer


def load_model(config: ModelConfig, key: jax.Array) -> Loaded:
    """Load pretrained weights, or draw fresh ones.

    Raises:
        DataError: the weights are missing or malformed, or the tokenizer has more ids than the embedding has rows.
    """
    if config.path is None:
        assert config.fresh is not None
        tokenizer = char_tokenizer(string.printable[:95] + "\n")
        spec = config.fresh.decoder(tokenizer.vocab_size)
        model = ModelDef(spec, config.dtype, config.remat)
        return Loaded(model, init(model, key), tokenizer)
    spec, params, tokenizer = read_pretrained(config.path)
    return Loaded(ModelDef(spec, config.dtype, config.remat), params, tokenizer)


def read_pretrained(path: str) -> tuple[DecoderSpec, Params, Tokenizer]:
    """Read weights and tokenizer from `smollm2`, a GGUF file, a Hugging Face folder, or a hub id."""
    source = find_smollm2() if path == "smollm2" else Path(path).expanduser()
    if source.suffix == ".gguf":
        if not source.is_file():
            raise DataError(f"model.path: no file {source}")
        tokenizer, (spec, params) = tokenizer_from_gguf(source), read_gguf(source)
    else:
        folder = source if source.is_dir() else _download(path)
        tokenizer, (spec, params) = tokenizer_from_hf(folder), read_hf(folder)
    if tokenizer.vocab_size > spec.vocab:
        raise DataError(
            f"model.path {path}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {spec.vocab} rows: "
            f"use the tokenizer that the weights were trained with"
        )
    return spec, params, tokenizer


def _download(hub_id: str) -> Path:
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise DataError(f"model.path: {hub_id} is neither a folder, a .gguf file, 'smollm2', nor a hub id (owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DataError(f"model.path: {hub_id} is no local folder; hub ids need the extra: ppojax[hub]") from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except OSError as error:
        raise DataError(f"model.path: cannot fetch {hub_id} from the hub ({error.__class__.__name__})") from error


def load_critic(config: CriticModelConfig, actor: Loaded, key: jax.Array) -> tuple[ModelDef, Params]:
    """Make the critic's model: cut from the actor, pretrained, or fresh; the value head starts at zero.

    Raises:
        DataError: the critic's tokenizer is not the actor's, or more layers are cut than the actor has.
    """
    if isinstance(config, CutCritic):
        if config.layers > actor.model.spec.layers:
            raise DataError(f"critic.model.layers = {config.layers}, the actor has {actor.model.spec.layers} layers")
        spec, params = cut_from_actor(actor.model.spec, actor.params, config.layers)
        return ModelDef(spec, actor.model.dtype, actor.model.remat, critic=True), params
    if isinstance(config, FreshCritic):
        model = ModelDef(
            config.shape.decoder(actor.model.spec.vocab), actor.model.dtype, actor.model.remat, critic=True
        )
        return model, init(model, key)
    spec, params, tokenizer = read_pretrained(config.path)
    if tokenizer.fingerprint() != actor.tokenizer.fingerprint():
        raise DataError(f"critic.model.path {config.path}: its tokenizer is not the actor's; they must be the same")
    spec, params = cut_from_actor(spec, params, spec.layers)
    return ModelDef(spec, actor.model.dtype, actor.model.remat, critic=True), params
