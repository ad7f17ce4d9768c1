"""Llama-type weights: the one table of tensor names, and Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401  (numpy learns bfloat16, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from ppojax.errors import DataError
from ppojax.models.spec import DecoderSpec, RopeSpec

Params = dict[str, Any]

# parameter: (Hugging Face, GGUF)
_TOP = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}
_LAYER = {
    "attn_norm": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "q": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "k": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "v": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "o": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "gate": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "up": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "down": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
}
# Buffers that old exports wrote beside the weights, and a head that a tied model does not read.
_IGNORED = (".rotary_emb.inv_freq", ".self_attn.masked_bias")
# config.json settings that would change the computation: the value that this decoder implements.
_EXPECTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}


def file_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """List the shape of each parameter as files store it: one layer, matrices [out, in]."""
    D, q, kv = spec.width, spec.heads * spec.head_width, spec.kv_heads * spec.head_width
    return {
        "embed": (spec.vocab, D),
        "norm": (D,),
        "head": (spec.vocab, D),
        "attn_norm": (D,),
        "q": (q, D),
        "k": (kv, D),
        "v": (kv, D),
        "o": (D, q),
        "mlp_norm": (D,),
        "gate": (spec.ffn, D),
        "up": (spec.ffn, D),
        "down": (D, spec.ffn),
    }


def assemble(
    spec: DecoderSpec,
    naming: Literal["hf", "gguf"],
    found: Mapping[str, tuple[int, ...]],
    fetch: Callable[[str], np.ndarray],
    where: str,
) -> Params:
    """Put tensors together as float32 parameters: layers stacked on a leading axis, matrices [in, out].

    Args:
        found: name and shape of every tensor in the files; checked before any is read.
        fetch: reads one tensor by its name.
        where: the file or folder, for errors.

    Raises:
        DataError: a tensor is missing, surplus, mis-shaped or not finite.
    """
    column = 0 if naming == "hf" else 1
    top = {key: names[column] for key, names in _TOP.items() if not (spec.tied and key == "head")}
    layers = {key: [names[column].format(n) for n in range(spec.layers)] for key, names in _LAYER.items()}
    shapes = file_shapes(spec)
    wanted = {name: shapes[key] for key, name in top.items()}
    wanted |= {name: shapes[key] for key, names in layers.items() for name in names}
    _check_names(wanted, found, {_TOP["head"][column]} if spec.tied else set(), where)

    def read(name: str) -> np.ndarray:
        weight = fetch(name)
        if not np.isfinite(weight).all():
            raise DataError(f"{where}: tensor {name} holds NaN or infinite values; download it again")
        return weight

    params: Params = {key: np.array(read(name), np.float32) for key, name in top.items()}
    params["layers"] = {}
    for key, names in layers.items():
        stacked = np.empty((spec.layers, *shapes[key][::-1]), np.float32)
        for n, name in enumerate(names):
            stacked[n] = read(name).T
        params["layers"][key] = stacked
    return params


def _check_names(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], unread: set[str], where: str
) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise DataError(f"{where}: tensor {name} is missing, expected shape {shape}; the export is not complete")
        if tuple(found[name]) != shape:
            raise DataError(f"{where}: tensor {name} has shape {tuple(found[name])}, expected {shape} from the config")
    for name in found:
        if name not in wanted and name not in unread and not name.endswith(_IGNORED):
            raise DataError(f"{where}: tensor {name} is not part of a Llama-type decoder; use a supported architecture")


def read_hf(folder: Path | str) -> tuple[DecoderSpec, Params]:
    """Read a Hugging Face folder of a Llama-type model as float32 parameters (see `assemble`).

    Reads `config.json` in the spellings of transformers 4 and 5, and one or several safetensors files in float32,
    float16 or bfloat16. Raises DataError naming the setting, file or tensor at fault; pickle weights are refused.
    """
    folder = Path(folder)
    spec = _spec(folder)
    place: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        for name, (shape, dtype) in _list_tensors(path).items():
            if dtype not in ("F32", "F16", "BF16"):
                raise DataError(f"{path}: tensor {name} is {dtype}, expected F32, F16 or BF16; convert the weights")
            place[name], shapes[name] = path, shape

    def fetch(name: str) -> np.ndarray:
        with safe_open(place[name], framework="np") as file:
            return file.get_tensor(name).astype(np.float32)

    return spec, assemble(spec, "hf", shapes, fetch, str(folder))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return [folder / "model.safetensors"]
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        if pickled:
            raise DataError(
                f"{folder}: {pickled[0]} is a pickle, which can run code; expected safetensors: convert it with "
                "transformers' save_pretrained"
            )
        raise DataError(f"{folder}: no model.safetensors and no model.safetensors.index.json; check model.path")
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DataError(f"{index}: names the file {name!r}, expected a .safetensors file of the same folder")
        if not (folder / name).is_file():
            raise DataError(f"{index}: names the file {name}, which is missing; download it again")
    return [folder / name for name in names]


def _list_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        cut = _first_cut_tensor(path)
        at = f"tensor {cut} is cut" if cut else f"not a safetensors file ({error})"
        raise DataError(f"{path}: {at}; download it again") from error


def _first_cut_tensor(path: Path) -> str | None:
    """Name the first tensor that ends past the end of the file, when the header can still be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return None
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    ends = sorted((info["data_offsets"][1], name) for name, info in header.items() if "data_offsets" in info)
    return next((name for end, name in ends if 8 + length + end > size), None)


def _spec(folder: Path) -> DecoderSpec:
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "llama":
        raise DataError(f"{path}: model_type {config.get('model_type')!r}, expected 'llama'; use a Llama-type model")
    for name, expected in _EXPECTED.items():
        if config.get(name, expected) != expected:
            raise DataError(f"{path}: {name} = {config[name]!r:.60}, expected {expected!r}; use another model")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise DataError(f"{path}: RoPE type {kind!r}, expected 'default'; use a model without RoPE scaling")
    try:
        heads, width = config["num_attention_heads"], config["hidden_size"]
        return DecoderSpec(
            layers=config["num_hidden_layers"],
            width=width,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or width // heads,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            rope=RopeSpec(theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]} is missing, expected as in any Llama-type model") from error


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
