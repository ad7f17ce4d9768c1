"""Hugging Face folders: `config.json` and safetensors, read without running anything that they hold."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ppojax.errors import DataError
from ppojax.models.families import read_config
from ppojax.models.families.config import HFConfig
from ppojax.models.families.family import Family
from ppojax.models.spec import DecoderSpec
from ppojax.models.weights import Params, Tensors, read_params

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1} | {
    name: dtype.itemsize for name, dtype in DTYPES.items()
}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_HEADER = 100 << 20  # as the safetensors library has it


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class HFFolder:
    """A folder whose config is understood and whose files are there; no weights are read yet."""

    path: Path
    family: Family
    spec: DecoderSpec
    config: dict[str, Any]

    def read(self, dtype: str = "float32", shardings: Params | None = None) -> Params:
        """Read the weights; see `weights.read_params`.

        Raises DataError naming the file or tensor at fault; pickle weights are refused.
        """
        stored: dict[str, Stored] = {}
        for path in _weight_files(self.path):
            for name, tensor in read_table(path).items():
                if tensor.dtype not in DTYPES:
                    raise DataError(
                        f"{path}: tensor {name} is {tensor.dtype}, expected {', '.join(DTYPES)}; convert the weights"
                    )
                if name in stored:
                    raise DataError(f"{path}: tensor {name} is in {stored[name].path.name} too; remove one of them")
                stored[name] = tensor
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        where, model_type = str(self.path), self.family.model_type
        tensors = Tensors(where, model_type, shapes, lambda name: _map(stored[name]))
        unread = self.family.unread
        if self.family.also_unread is not None:
            unread += self.family.also_unread(HFConfig(where, self.config))
        return read_params(tensors, self.spec, self.family.rules, unread=unread, dtype=dtype, shardings=shardings)


def open_hf(folder: Path | str) -> HFFolder:
    """Read the `config.json` of a folder, in the spelling of transformers 4 or 5.

    Raises DataError naming a setting that is not supported.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    family, spec = read_config(str(folder / "config.json"), config)
    return HFFolder(folder, family, spec, config)


def read_hf(folder: Path | str, dtype: str = "float32") -> tuple[DecoderSpec, Params]:
    """Read a Hugging Face folder: one or several safetensors files in float32, float16 or bfloat16.

    Raises DataError as `open_hf` and `HFFolder.read` do.
    """
    opened = open_hf(folder)
    return opened.spec, opened.read(dtype)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickled:
            raise DataError(
                f"{folder}: {pickled[0]} is a pickle, which can run code; expected safetensors: convert it with "
                "transformers' save_pretrained"
            )
        raise DataError(f"{folder}: no {WEIGHTS} and no {INDEX}; check model.path")
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise DataError(f"{index}: no weight_map, expected the file of each tensor; download it again")
    for name in placed.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise DataError(f"{index}: names the file {name!r}, expected a .safetensors file of the same folder")
        if not (folder / name).is_file():
            raise DataError(f"{index}: names the file {name}, which is missing; download it again")
    return [folder / name for name in sorted(set(placed.values()))]


def read_table(path: Path) -> dict[str, Stored]:
    """List the tensors of a safetensors file; their places are checked against the file.

    Raises DataError when the file is cut or is not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise DataError(f"{path}: not a safetensors file (its header is cut); download it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise DataError(f"{path}: not a safetensors file ({error}); download it again") from error
    if not isinstance(header, dict):
        raise DataError(f"{path}: not a safetensors file (its header is no object); download it again")
    header.pop("__metadata__", None)
    start = 8 + length
    table = {}
    for name, info in header.items():
        try:
            dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
            begin, end = (int(n) for n in info["data_offsets"])
            expected = math.prod(shape) * _BYTES[dtype]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: the header entry of tensor {name} is malformed; download it again") from error
        if begin < 0 or end - begin != expected or any(n < 0 for n in shape):
            raise DataError(
                f"{path}: tensor {name} has {end - begin} bytes, expected {expected} for {dtype} {shape}; "
                "download it again"
            )
        if start + end > size:
            raise DataError(f"{path}: tensor {name} is cut; download it again")
        table[name] = Stored(path, dtype, shape, start + begin)
    return table


def _map(tensor: Stored) -> np.ndarray:
    """Map one tensor into memory; the pages go when the array does."""
    if 0 in tensor.shape:
        return np.empty(tensor.shape, DTYPES[tensor.dtype])
    return np.memmap(tensor.path, DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError when the file is missing or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected a Hugging Face model folder, check model.path") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a JSON {type(content).__name__}, expected an object; download it again")
    return content
