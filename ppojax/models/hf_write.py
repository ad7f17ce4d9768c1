"""Models as Hugging Face folders that transformers loads: config, sharded safetensors, tokenizer."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ppojax.models.families import write_config
from ppojax.models.families.family import Family
from ppojax.models.families.layout import Place, Shape, get, places
from ppojax.models.hf import INDEX, WEIGHTS, read_json
from ppojax.models.safe_write import header, whole, write_text
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer import Tokenizer
from ppojax.models.tokenizer_files import own_template
from ppojax.models.weights import Params

log = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000
# What a config says besides the computation, carried over from the model that was trained.
_KEPT = ("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
_KEPT += ("router_aux_loss_coef", "output_router_logits")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_FILES += ("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json")


class Origin(NamedTuple):
    """What an exported model has besides its weights; all of it may be absent."""

    tokenizer: Tokenizer | None = None
    folder: Path | None = None  # of the model that was trained: its tokenizer's files are taken over as they are
    config: Mapping[str, Any] = {}  # its config.json


class _Group(NamedTuple):
    """Parameters that share their tensors."""

    places: list[Place]
    names: list[list[str]]  # one list a block, in which one an expert
    shape: Shape
    dtype: np.dtype


def write_hf(
    folder: Path | str,
    family: Family,
    spec: DecoderSpec,
    params: Params,
    origin: Origin,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that transformers 5 (and 4) loads; it is there whole or not at all.

    Args:
        dtype: of the weights in the files; None: that of the parameters.
        shard_bytes: most bytes of weights in one file (a single tensor may have more).

    Raises:
        ConfigError: the folder is there and not empty.
        CannotWriteError: the disk refuses.
        DataError: the family cannot express the spec.
    """
    config = _config(family, spec, origin)
    groups = list(_groups(family, spec, np.dtype(params["embed"].dtype if dtype is None else dtype)))
    name = str(groups[0].dtype)
    with whole(Path(folder).expanduser()) as staging:
        write_text(staging / "config.json", json.dumps(config | {"dtype": name, "torch_dtype": name}, indent=2) + "\n")
        write_tokenizer(staging, origin)
        _write_weights(staging, spec, groups, params, shard_bytes)


def _config(family: Family, spec: DecoderSpec, origin: Origin) -> dict[str, Any]:
    config = write_config(family, spec)
    # transformers has ids of its own for what is absent.
    config |= {"max_position_embeddings": 32_768, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if origin.tokenizer is not None:
        config |= {"eos_token_id": list(origin.tokenizer.eos_ids), "pad_token_id": origin.tokenizer.pad_id}
    return config | {name: origin.config[name] for name in _KEPT if name in origin.config}


def write_tokenizer(folder: Path, origin: Origin) -> None:
    """Write the files of the tokenizer, where there is one, with the chat template of training."""
    if origin.folder is not None:
        for name in _TOKENIZER_FILES:
            if (origin.folder / name).is_file():
                shutil.copyfile(origin.folder / name, folder / name)
        if origin.tokenizer is not None:
            _write_template(folder, origin.folder, origin.tokenizer.template.source)
    elif origin.tokenizer is not None:
        origin.tokenizer.save(folder)


def _write_template(folder: Path, original: Path, source: str) -> None:
    """Make the template that rows were written with the folder's own; keep the original by that name."""
    settings, own = read_json(original / "tokenizer_config.json"), own_template(original)
    if own == source and not isinstance(settings.get("chat_template"), list):
        return
    write_text(folder / "chat_template.jinja", source)
    if "chat_template" in settings:  # readers that know no .jinja file look here
        write_text(folder / "tokenizer_config.json", json.dumps(settings | {"chat_template": source}, indent=2) + "\n")
    if own not in (None, source):
        (folder / "additional_chat_templates").mkdir()
        write_text(folder / "additional_chat_templates/original.jinja", own)
        log.warning(
            "export: the chat template is that of training; the model's own is additional_chat_templates/original.jinja"
        )


def _groups(family: Family, spec: DecoderSpec, dtype: np.dtype) -> Iterator[_Group]:
    """Group the parameters by the tensors that they share."""
    shared: dict[tuple[int | None, str], list[Place]] = {}
    for place in places(spec, family.rules):
        shared.setdefault((place.start, place.rules[0].name), []).append(place)
    for found in shared.values():
        first = found[0]
        kind = np.dtype(np.float32) if first.path[-1] in family.exact else dtype
        yield _Group(found, first.names(first.rules[0]), first.rules[0].file_shape(first.inner), kind)


def _write_weights(folder: Path, spec: DecoderSpec, groups: list[_Group], params: Params, shard_bytes: int) -> None:
    """Write tensor after tensor; the host holds the parameters of one group at a time."""
    plan = [(name, group) for group in groups for names in group.names for name in names]
    shards: list[list[tuple[str, _Group]]] = [[]]
    filled = 0
    for name, group in plan:
        size = int(np.prod(group.shape)) * group.dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, group))
        filled += size
    files = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    )
    tensors = _tensors(spec, groups, params)
    total = 0
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(header((name, group.shape, group.dtype) for name, group in shard))
            for _ in shard:
                tensor = next(tensors)
                out.write(tensor.data)
                total += tensor.nbytes
            out.flush()
            os.fsync(out.fileno())
    if len(files) > 1:
        placed = {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}
        write_text(
            folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2) + "\n"
        )


def _tensors(spec: DecoderSpec, groups: list[_Group], params: Params) -> Iterator[np.ndarray]:
    """Make the tensors of the files, in the order of the plan, as bytes."""
    for group in groups:
        parts = []
        for place in group.places:
            rule = place.rules[0]
            order = slice(None) if rule.order is None else rule.order(spec)
            parts.append((place, rule, order, np.asarray(jax.device_get(get(params, place.path)))))
        for n, names in enumerate(group.names):
            for e in range(len(names)):
                tensor = np.empty(group.shape, group.dtype)
                for place, rule, order, value in parts:
                    part = value if place.start is None else value[n, e] if rule.by_expert else value[n]
                    rule.view(tensor)[..., order] = part.astype(group.dtype)
                yield tensor.reshape(-1).view(np.uint8)
