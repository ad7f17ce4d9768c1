"""Adapters alone, as PEFT loads them beside a base: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppojax.errors import DataError
from ppojax.models.families.family import Family
from ppojax.models.families.layout import places
from ppojax.models.forward import Params
from ppojax.models.hf_write import Origin, write_tokenizer
from ppojax.models.lora import LoRAConfig
from ppojax.models.safe_write import header, whole, write_text
from ppojax.models.spec import DecoderSpec

# Where experts have matrices of these names, PEFT (0.21) turns them into targets on the experts.
_MLP = {"gate", "up", "down", "shared_gate", "shared_up", "shared_down"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(
    folder: Path | str,
    family: Family,
    spec: DecoderSpec,
    params: Params,
    lora: LoRAConfig,
    origin: Origin,
    *,
    base: str,
    dtype: str = "float32",
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads; it is there whole or not at all.

    Args:
        params: of the decoder; only adapters are read.
        origin: the tokenizer, and the folder of the base that it came with.
        base: where PEFT looks for the base when it is not given one: a folder or a hub id.
        dtype: of the adapters in the file.

    Raises:
        ConfigError: the folder is there and not empty.
        CannotWriteError: the disk refuses.
        DataError: PEFT has no place for an adapter.
    """
    tensors = dict(_tensors(family, spec, params, np.dtype(dtype)))
    modules = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors})
    with whole(Path(folder).expanduser()) as staging:
        write_text(staging / CONFIG, json.dumps(_config(lora, modules, base), indent=2) + "\n")
        write_tokenizer(staging, origin)
        with (staging / WEIGHTS).open("wb") as out:
            out.write(header((name, value.shape, value.dtype) for name, value in tensors.items()))
            for value in tensors.values():
                out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            out.flush()
            os.fsync(out.fileno())


def _config(lora: LoRAConfig, modules: list[str], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({module.split(".")[-1] for module in modules}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _tensors(family: Family, spec: DecoderSpec, params: Params, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's y = W x + scale B A x has A = a^T and B = b^T, whose rows lie as those of W in the file."""
    wrong = sorted(
        {name for stack in params.values() if isinstance(stack, dict) for name in stack.get("lora", {})} & _MLP
    )
    if spec.moe is not None and wrong:
        raise DataError(
            f"export: PEFT takes adapters of {', '.join(wrong)} in a {family.model_type} model for those of its "
            "experts, expected model.lora.targets of attention alone: export merged, without adapter=true"
        )
    for place in places(spec, family.rules):
        pair = None if place.start is None else params.get(place.path[0], {}).get("lora", {}).get(place.path[1])
        if pair is None:
            continue
        rule = place.rules[0]
        if rule.part is not None or not rule.transposed:
            raise DataError(
                f"export: PEFT has no place for adapters of {place.path[1]} in a {family.model_type} model, where "
                f"{rule.name} holds several matrices; expected a matrix of its own: export merged, without adapter=true"
            )
        a_LIR, b_LRO = (np.asarray(jax.device_get(pair[x]), np.float32) for x in "ab")
        stored_LRO = np.empty_like(b_LRO)
        stored_LRO[..., slice(None) if rule.order is None else rule.order(spec)] = b_LRO
        for n, names in enumerate(place.names(rule)):
            module = f"base_model.model.{names[0].removesuffix('.weight')}"
            yield f"{module}.lora_A.weight", a_LIR[n].T.astype(dtype)
            yield f"{module}.lora_B.weight", stored_LRO[n].T.astype(dtype)
