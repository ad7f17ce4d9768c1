"""Where a model comes from: a GGUF file, a Hugging Face folder, or a hub id; its shape is known before its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from ppojax.errors import DataError
from ppojax.models.chat import ChatTemplate
from ppojax.models.families.family import Family
from ppojax.models.forward import ModelDef, Params, param_shardings
from ppojax.models.gguf import open_gguf
from ppojax.models.hf import open_hf
from ppojax.models.smollm2 import find_smollm2
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer import Tokenizer
from ppojax.models.tokenizer_files import tokenizer_from_gguf, tokenizer_from_hf

HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


@dataclass(frozen=True)
class Source:
    """A model on the disk whose shape is known.

    Attributes:
        path: the GGUF file or the folder.
        config: its `config.json`; empty for a GGUF file.
        read: reads the weights in a dtype, each parameter with the sharding of a tree, or all on one device.
    """

    path: Path
    family: Family
    spec: DecoderSpec
    read: Callable[[str, Params | None], Params]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one."""
        return self.path if self.path.is_dir() else None

    def place(self, dtype: str, mesh: jax.sharding.Mesh | None) -> Params:
        """Read the weights, each device its part.

        Raises DataError naming the tensor at fault.
        """
        return self.read(dtype, None if mesh is None else param_shardings(ModelDef(self.spec), mesh))

    def tokenizer(self, chat_template: str | ChatTemplate = "auto") -> Tokenizer:
        """Read the tokenizer, with a chat template or the choice of one (see `variants.choose_template`).

        Raises DataError when it is missing or has more ids than the embedding has rows.
        """
        read = tokenizer_from_hf if self.path.is_dir() else tokenizer_from_gguf
        tokenizer = read(self.path, chat_template)
        if tokenizer.vocab_size > self.spec.vocab:
            raise DataError(
                f"model.path {self.path}: the tokenizer has {tokenizer.vocab_size} ids, the embedding "
                f"{self.spec.vocab} rows: use the tokenizer that the weights were trained with"
            )
        return tokenizer


def find_source(path: str) -> Source:
    """Find `smollm2`, a GGUF file, a Hugging Face folder, or a hub id, and read its shape.

    Raises DataError when there is none, or it is of a kind that is not supported.
    """
    place = find_smollm2() if path == "smollm2" else Path(path).expanduser()
    if place.suffix == ".gguf":
        if not place.is_file():
            raise DataError(f"model.path: no file {place}")
        model = open_gguf(place)
        return Source(place, model.family, model.spec, model.read)
    folder = open_hf(place if place.is_dir() else _download(path))
    return Source(folder.path, folder.family, folder.spec, folder.read, folder.config)


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
