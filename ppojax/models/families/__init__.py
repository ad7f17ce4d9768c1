"""Model families: one file each turns Hugging Face configs and tensors into a spec and parameters, and back.

To add one, write its file and name it in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ppojax.errors import DataError
from ppojax.models.families import (
    deepseek_v3,
    gemma3,
    gpt_oss,
    llama,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from ppojax.models.families.config import HFConfig
from ppojax.models.families.family import Family
from ppojax.models.spec import DecoderSpec

_ALL = (llama, smollm3, qwen2, qwen3, qwen3_moe, gemma3, gpt_oss, deepseek_v3)
FAMILIES: Mapping[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _ALL}


def read_config(where: str, values: Mapping[str, Any]) -> tuple[Family, DecoderSpec]:
    """Find the family of a config and turn it into a spec.

    Raises:
        DataError: the family is not known, the model comes with code of its own, or a setting is not supported.
    """
    model_type = values.get("model_type")
    supported = f"expected one of {', '.join(FAMILIES)}"
    if "auto_map" in values:
        raise DataError(
            f"{where}: auto_map asks for the model's own code, which is never run; {supported}, without auto_map"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise DataError(f"{where}: model_type {model_type!r:.60}, {supported}; use a model of these families")
    if values.get("quantization_config") is not None:
        method = values["quantization_config"]
        raise DataError(f"{where}: quantization_config = {method!r:.60}, expected none; use unquantised weights")
    family = FAMILIES[model_type]
    try:
        return family, family.spec_from(HFConfig(where, values))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "settings"
        raise DataError(f"{where}: {at}: {first['msg']} (found {first['input']!r:.60}); fix the config") from error


def write_config(family: Family, spec: DecoderSpec) -> dict[str, Any]:
    """Write a spec as a config of a family.

    Raises:
        DataError: the family cannot express the spec.
    """
    config = family.config_from(spec)
    if family.spec_from(HFConfig("config", config)) != spec:
        raise DataError(f"export: a {family.model_type} model cannot express this decoder; name another model_type")
    return config


def family_for(spec: DecoderSpec) -> Family:
    """Find a family that can express a spec: the first one, so Llama before those that extend it.

    Raises:
        DataError: none can.
    """
    for family in FAMILIES.values():
        try:
            write_config(family, spec)
        except (DataError, ValidationError):
            continue
        return family
    raise DataError(f"export: no family can express this decoder, expected one of {', '.join(FAMILIES)}")
