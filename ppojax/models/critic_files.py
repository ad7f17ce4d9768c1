"""A critic as a folder: `critic.json` says what it is, `critic.safetensors` holds its float32 parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ppojax.errors import DataError
from ppojax.models.forward import ModelDef, Params, abstract_params
from ppojax.models.safe_write import whole, write_text
from ppojax.models.spec import DecoderSpec
from ppojax.models.value_head import ValueHead

ABOUT, WEIGHTS = "critic.json", "critic.safetensors"
_HEAD: TypeAdapter[ValueHead] = TypeAdapter(ValueHead)


@dataclass(frozen=True)
class StoredCritic:
    """What `write_critic` wrote."""

    spec: DecoderSpec
    head: ValueHead
    params: Params
    tokenizer: str  # its fingerprint


def write_critic(folder: Path, model: ModelDef, params: Params, tokenizer: str, about: dict[str, Any]) -> None:
    """Write a critic, whole or not at all; `about` is kept beside what is needed to read it again.

    Raises:
        ConfigError: the folder is there and not empty.
        CannotWriteError: the disk refuses.
    """
    assert model.head is not None and model.count == 1 and model.lora is None
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(params))
    tensors = {_name(path): np.ascontiguousarray(value, np.float32) for path, value in flat}
    shape = {"spec": model.spec.model_dump(mode="json"), "head": model.head.model_dump(mode="json")}
    with whole(folder) as staging:
        save_file(tensors, staging / WEIGHTS)
        write_text(staging / ABOUT, json.dumps({**shape, "tokenizer": tokenizer, **about}, indent=2) + "\n")


def read_critic(folder: Path) -> StoredCritic:
    """Read a critic. Raises DataError where there is none, or it is damaged."""
    try:
        said = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        spec, head = DecoderSpec.model_validate(said["spec"]), _HEAD.validate_python(said["head"])
        tensors, tokenizer = load_file(folder / WEIGHTS), str(said["tokenizer"])
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: there is no critic (no {error.filename}); python -m ppojax.critic_fit writes one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise DataError(f"{folder}: the critic cannot be read ({error!s:.200}); fit it again") from error
    wanted = abstract_params(ModelDef(spec, head=head))
    flat, structure = jax.tree_util.tree_flatten_with_path(wanted)
    for path, leaf in flat:
        found = tensors.get(_name(path))
        if found is None or found.shape != leaf.shape or not np.isfinite(found).all():
            shape = "missing" if found is None else f"{found.shape}, with numbers that are not finite or"
            raise DataError(f"{folder / WEIGHTS}: tensor {_name(path)} is {shape}, expected {leaf.shape}; fit it again")
    params = jax.tree_util.tree_unflatten(structure, [tensors[_name(path)] for path, _ in flat])
    return StoredCritic(spec, head, params, tokenizer)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in path)
