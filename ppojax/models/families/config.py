"""Reading and writing what the `config.json` of every family has in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ppojax.errors import DataError
from ppojax.models.spec import DecoderSpec, RopeSpec

_ROPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_SLIDING = {"sliding_attention": True, "full_attention": False}


class HFConfig:
    """A `config.json` in the spelling of transformers 4 or 5; errors name the file and the setting."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or the default where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 on. Raises DataError when it is something else, or absent without a default."""
        value = self.get(name, default)
        if value is None:
            raise DataError(f"{self.where}: {name} is missing, expected as in any {self.family} model")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DataError(f"{self.where}: {name} = {value!r:.60}, expected a whole number from 1 on; fix the config")
        return value

    @property
    def family(self) -> str:
        """The model type, for messages."""
        return str(self.get("model_type"))

    def expect(self, expected: Mapping[str, Any]) -> None:
        """Check settings that would change the computation: each is absent, null, or what this decoder implements.

        Raises DataError naming the first that is not.
        """
        for name, value in expected.items():
            found = self.get(name, value)
            if found != value or isinstance(found, bool) != isinstance(value, bool):
                raise DataError(f"{self.where}: {name} = {found!r:.60}, expected {value!r}; use another model")

    def heads(self, head_width: int | None = None) -> dict[str, Any]:
        """Heads and their width; without `head_dim` that is `head_width`, or what the model width leaves for each."""
        heads = self.integer("num_attention_heads")
        return {
            "heads": heads,
            "kv_heads": self.integer("num_key_value_heads", heads),
            "head_width": self.integer("head_dim", head_width or max(self.integer("hidden_size") // heads, 1)),
        }

    def sizes(self) -> dict[str, Any]:
        """Layers, width, hidden width and vocabulary."""
        return {
            "layers": self.integer("num_hidden_layers"),
            "width": self.integer("hidden_size"),
            "ffn": self.integer("intermediate_size"),
            "vocab": self.integer("vocab_size"),
        }

    def windows(self, default: Sequence[bool], window: int | None = None) -> dict[str, Any]:
        """Sliding windows: from `layer_types`, or else `default`; `window` (or `sliding_window`) is their length."""
        types = self.get("layer_types")
        if types is not None:
            unknown = [t for t in types if t not in _SLIDING]
            if unknown:
                raise DataError(
                    f"{self.where}: layer_types has {unknown[0]!r:.60}, expected {' or '.join(_SLIDING)}; "
                    "use another model"
                )
            default = [_SLIDING[t] for t in types]
        if not any(default):
            return {}
        return {"window": window or self.integer("sliding_window"), "windowed": tuple(default)}

    def rope(self, theta: float, given: Mapping[str, Any] | None = None) -> RopeSpec:
        """Rotary positions; `theta` is the family's default, `given` those of one kind of block where they differ.

        Raises DataError when they are stretched in a way that this decoder does not implement.
        """
        found: Mapping[str, Any] = self.rope_settings() if given is None else given
        theta = float(found.get("rope_theta") or self.get("rope_theta", theta))
        kind = found.get("rope_type", found.get("type")) or "default"
        if kind not in _ROPES:
            raise DataError(f"{self.where}: RoPE type {kind!r:.60}, expected {', '.join(_ROPES)}; use another model")
        part = found.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)
        if part != 1.0 or found.get("mrope_section"):
            raise DataError(
                f"{self.where}: RoPE turns only part of a head (partial_rotary_factor = {part}, mrope_section), "
                "expected all of it; use another model"
            )
        if kind == "default":
            return RopeSpec(theta=theta)
        most = self.get("max_position_embeddings", 0)
        original = found.get("original_max_position_embeddings") or most
        factor = found.get("factor") or (most / original if kind == "yarn" and most else None)
        if factor is None or (not original and kind != "linear"):
            absent = "factor" if factor is None else "original_max_position_embeddings"
            raise DataError(f"{self.where}: RoPE type {kind!r} without {absent}; add it to rope_parameters")
        if kind == "linear":
            return RopeSpec(theta=theta, scaling="linear", factor=factor)
        if kind == "llama3":
            low, high = found.get("low_freq_factor", 1.0), found.get("high_freq_factor", 4.0)
            return RopeSpec(theta=theta, scaling="llama3", factor=factor, original=original, low=low, high=high)
        return RopeSpec(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original=original,
            beta_fast=found.get("beta_fast") or 32.0,
            beta_slow=found.get("beta_slow") or 1.0,
            truncate=found.get("truncate", True),
            magnitude=_yarn_magnitude(found, factor),
        )

    def rope_settings(self) -> Mapping[str, Any]:
        """The table of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`). Raises DataError if it is none."""
        found = self.get("rope_scaling") or self.get("rope_parameters") or {}
        if not isinstance(found, dict):
            raise DataError(f"{self.where}: rope_parameters = {found!r:.60}, expected a table; fix the config")
        return found


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1 (arXiv 2309.00071, equation 22; mscale is DeepSeek's)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_magnitude(given: Mapping[str, Any], factor: float) -> float:
    if given.get("attention_factor") is not None:
        return given["attention_factor"]
    if given.get("mscale") and given.get("mscale_all_dim"):
        return yarn_scale(factor, given["mscale"]) / yarn_scale(factor, given["mscale_all_dim"])
    return yarn_scale(factor)


def common_config(model_type: str, architecture: str, spec: DecoderSpec) -> dict[str, Any]:
    """The settings of a config.json that every family has."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.width,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "intermediate_size": spec.ffn,
        "vocab_size": spec.vocab,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    } | rope_config(spec.rope)


def rope_config(rope: RopeSpec) -> dict[str, Any]:
    """Rotary positions as transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) spell them."""
    parameters = rope_parameters(rope)
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "none" else scaling,
        "rope_parameters": parameters,
    }


def rope_parameters(rope: RopeSpec) -> dict[str, Any]:
    """Rotary positions in the spelling of transformers 5."""
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.theta}
    found: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta, "factor": rope.factor}
    if rope.scaling != "linear":
        found["original_max_position_embeddings"] = rope.original
    if rope.scaling == "llama3":
        found |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    if rope.scaling == "yarn":
        found |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if not math.isclose(rope.magnitude, yarn_scale(rope.factor), rel_tol=1e-12):
            found["attention_factor"] = rope.magnitude
    return found


def layer_types(spec: DecoderSpec) -> list[str]:
    """Name the attention of every block."""
    names = {sliding: name for name, sliding in _SLIDING.items()}
    return [names[w] for w in spec.windowed or (False,) * spec.layers]
