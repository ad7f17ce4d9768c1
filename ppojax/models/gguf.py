"""Weights and metadata of a GGUF file: the header is parsed here, the `gguf` package expands quantised blocks."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppojax.errors import DataError
from ppojax.models.families import FAMILIES
from ppojax.models.families.family import Family
from ppojax.models.families.layout import Order, Rule, Rules, named
from ppojax.models.spec import DecoderSpec, RopeSpec
from ppojax.models.weights import Params, Tensors, read_params

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """Where a tensor lies; `shape` is row-major (the file lists it the other way round)."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFHeader(NamedTuple):
    """What a GGUF file says before its data."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data: np.ndarray  # uint8, the whole file, memory-mapped

    def field(self, name: str, kind: type) -> Any:
        """Look up a metadata field. Raises DataError when it is absent or of another type."""
        value = self.fields.get(name)
        if not isinstance(value, kind):
            raise DataError(f"{self.path}: GGUF field {name!r} is {value!r:.40}, expected {kind.__name__}; re-export")
        return value


class _Cursor:
    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at = path, data.data, 0

    def scalar(self, form: str) -> Any:
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        size = self.scalar("<Q")
        if self.at + size > len(self.data):
            raise struct.error("string past the end")
        value = self.data[self.at : self.at + size].tobytes().decode("utf-8", "surrogateescape")
        self.at += size
        return value

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if item in (_STRING, _ARRAY):
                return [self.value(item) for _ in range(count)]
            form = _SCALARS[item]
            values = struct.unpack_from(f"<{count}{form[1]}", self.data, self.at)
            self.at += count * struct.calcsize(form)
            return list(values)
        return self.scalar(_SCALARS[kind])


def read_header(path: Path | str) -> GGUFHeader:
    """Read the metadata and the tensor table of a GGUF file (versions 2 and 3, little-endian).

    Raises DataError when the file is missing, is no GGUF, or ends inside its header.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size == 0:
        raise DataError(f"{path}: no such GGUF file, expected the path of a .gguf file; check model.path")
    status = path.stat()
    return _read_header(path, (status.st_mtime_ns, status.st_size, status.st_ino))


@lru_cache(maxsize=1)  # the tokenizer reads it, too
def _read_header(path: Path, stamp: tuple[int, ...]) -> GGUFHeader:
    data = np.memmap(path, np.uint8, "r")
    cursor = _Cursor(path, data)
    try:
        if cursor.scalar("<4s") != b"GGUF":
            raise DataError(f"{path}: starts with {data[:4].tobytes()!r}, expected b'GGUF'; give a .gguf file")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise DataError(f"{path}: GGUF version {version}, expected 2 or 3 (little-endian); re-export it")
        tensor_count, field_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        fields = {cursor.string(): cursor.value(cursor.scalar("<I")) for _ in range(field_count)}
        tensors = {}
        for _ in range(tensor_count):
            name = cursor.string()
            shape = tuple(cursor.scalar("<Q") for _ in range(cursor.scalar("<I")))[::-1]
            tensors[name] = GGUFTensor(shape, cursor.scalar("<I"), cursor.scalar("<Q"))
    except (struct.error, KeyError) as error:
        raise DataError(f"{path}: the GGUF header is cut or corrupt at byte {cursor.at}; download it again") from error
    alignment = fields.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    placed = {name: t._replace(offset=start + t.offset) for name, t in tensors.items()}
    return GGUFHeader(path, fields, placed, data)


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file whose metadata is understood; no weights are read yet."""

    header: GGUFHeader
    family: Family
    spec: DecoderSpec
    rules: Rules

    def read(self, dtype: str = "float32", shardings: Params | None = None) -> Params:
        """Read the weights; see `weights.read_params`.

        Raises DataError naming the tensor when one is missing, surplus, cut, mis-shaped or non-finite.
        """
        header = self.header
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        tensors = Tensors(str(header.path), self.family.model_type, shapes, lambda name: _dequantize(header, name))
        return read_params(tensors, self.spec, self.rules, dtype=dtype, shardings=shardings)


def open_gguf(path: Path | str) -> GGUFModel:
    """Read the metadata of a GGUF file of a Llama, Qwen2 or Qwen3 model.

    Raises DataError when the architecture or a RoPE scaling is not supported.
    """
    header = read_header(path)
    spec, rules = _read_metadata(header)
    return GGUFModel(header, FAMILIES[header.field("general.architecture", str)], spec, rules)


def read_gguf(path: Path | str, dtype: str = "float32") -> tuple[DecoderSpec, Params]:
    """Read a GGUF file. Raises DataError as `open_gguf` and `GGUFModel.read` do."""
    model = open_gguf(path)
    return model.spec, model.read(dtype)


def _by_pairs(heads: Callable[[DecoderSpec], int]) -> Order:
    """Llama's queries and keys are interleaved, for the rotation of llama.cpp; here they are "rotate half"."""

    def order(spec: DecoderSpec) -> np.ndarray:
        pairs = np.arange(spec.head_width).reshape(-1, 2).T.reshape(-1)
        return (np.arange(heads(spec))[:, None] * spec.head_width + pairs[None, :]).reshape(-1)

    return order


_TOP: Rules = {
    "embed": (Rule("token_embd.weight", transposed=False),),
    "norm": (Rule("output_norm.weight"),),
    "head": (Rule("output.weight", transposed=False),),
}
_BLOCK = named(
    "blk.{layer}.",
    {"attn_norm": "attn_norm.weight", "mlp_norm": "ffn_norm.weight"}
    | {"q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight", "o": "attn_output.weight"}
    | {"q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias"}
    | {"q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight"}
    | {"gate": "ffn_gate.weight", "up": "ffn_up.weight", "down": "ffn_down.weight"},
)
_INTERLEAVED: Rules = {
    "q": (Rule("blk.{layer}.attn_q.weight", order=_by_pairs(lambda spec: spec.heads)),),
    "k": (Rule("blk.{layer}.attn_k.weight", order=_by_pairs(lambda spec: spec.kv_heads)),),
}
# architecture: rules, and what its decoders have besides Llama's parts
_ARCHITECTURES: dict[str, tuple[Rules, dict[str, Any]]] = {
    "llama": ({**_TOP, **_BLOCK, **_INTERLEAVED}, {}),
    "qwen2": ({**_TOP, **_BLOCK}, {"qkv_bias": True}),
    "qwen3": ({**_TOP, **_BLOCK}, {"qk_norm": True}),
}


def _read_metadata(header: GGUFHeader) -> tuple[DecoderSpec, Rules]:
    kind = header.field("general.architecture", str)
    if kind not in _ARCHITECTURES:
        raise DataError(
            f"{header.path}: architecture {kind!r}, expected one of {', '.join(_ARCHITECTURES)}; "
            "use its safetensors instead"
        )
    scaling = header.fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise DataError(f"{header.path}: RoPE scaling {scaling!r}, expected none; use a model without RoPE scaling")
    rules, parts = _ARCHITECTURES[kind]
    width, heads = header.field(f"{kind}.embedding_length", int), header.field(f"{kind}.attention.head_count", int)
    spec = DecoderSpec(
        layers=header.field(f"{kind}.block_count", int),
        width=width,
        heads=heads,
        kv_heads=header.fields.get(f"{kind}.attention.head_count_kv", heads),
        head_width=header.fields.get(f"{kind}.attention.key_length", width // heads),
        ffn=header.field(f"{kind}.feed_forward_length", int),
        vocab=len(header.field("tokenizer.ggml.tokens", list)),
        rope=RopeSpec(theta=header.fields.get(f"{kind}.rope.freq_base", 10_000.0)),
        # The file keeps a float32 (9.999999747e-06 for 1e-5); the shortest decimal of that float is what was meant.
        norm_eps=float(str(np.float32(header.field(f"{kind}.attention.layer_norm_rms_epsilon", float)))),
        tied="output.weight" not in header.tensors,
        **parts,
    )
    return spec, rules


def _dequantize(header: GGUFHeader, name: str) -> np.ndarray:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError as error:
        raise DataError("GGUF weights need the package gguf, which is not installed; pip install gguf") from error
    tensor = header.tensors[name]
    if tensor.kind not in list(GGMLQuantizationType):
        raise DataError(f"{header.path}: tensor {name} has the unknown GGML type {tensor.kind}; re-export it as F16")
    kind = GGMLQuantizationType(tensor.kind)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    count = math.prod(tensor.shape) // block * block_bytes
    raw = header.data[tensor.offset : tensor.offset + count]
    if len(raw) < count:
        raise DataError(f"{header.path}: tensor {name} is cut, {len(raw)} of {count} bytes; download it again")
    try:
        weight = dequantize(raw.reshape(*tensor.shape[:-1], -1), kind)
    except NotImplementedError as error:
        raise DataError(
            f"{header.path}: tensor {name} is quantised as {kind.name}, which the gguf package cannot expand; "
            "re-export it as F16 or Q8_0"
        ) from error
    return np.asarray(weight, np.float32).reshape(tensor.shape)
