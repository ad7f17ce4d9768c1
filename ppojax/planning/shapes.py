"""Shapes of published models, by their names on the hub, so that planning needs none of their files."""

from __future__ import annotations

from pathlib import Path

from ppojax.errors import ConfigError
from ppojax.models.source import find_source
from ppojax.models.spec import DecoderSpec, MoESpec, RopeSpec

_QWEN2_5 = {"qkv_bias": True, "norm_eps": 1e-6, "rope": RopeSpec(theta=1e6)}
_QWEN3 = {"qk_norm": True, "norm_eps": 1e-6, "rope": RopeSpec(theta=1e6)}


def _spec(
    layers: int, width: int, heads: tuple[int, int, int], ffn: int, vocab: int, tied: bool, **more: object
) -> DecoderSpec:
    """`heads`: query heads, key/value heads, width of one."""
    query, shared, head_width = heads
    sizes = {"layers": layers, "width": width, "heads": query, "kv_heads": shared, "head_width": head_width}
    return DecoderSpec.model_validate({**sizes, "ffn": ffn, "vocab": vocab, "tied": tied, **more})


# From the config.json of each.
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": _spec(24, 896, (14, 2, 64), 4864, 151_936, True, **_QWEN2_5),
    "Qwen/Qwen2.5-1.5B-Instruct": _spec(28, 1536, (12, 2, 128), 8960, 151_936, True, **_QWEN2_5),
    "Qwen/Qwen2.5-3B-Instruct": _spec(36, 2048, (16, 2, 128), 11_008, 151_936, True, **_QWEN2_5),
    "Qwen/Qwen2.5-7B-Instruct": _spec(28, 3584, (28, 4, 128), 18_944, 152_064, False, **_QWEN2_5),
    "Qwen/Qwen3-0.6B": _spec(28, 1024, (16, 8, 128), 3072, 151_936, True, **_QWEN3),
    "Qwen/Qwen3-1.7B": _spec(28, 2048, (16, 8, 128), 6144, 151_936, True, **_QWEN3),
    "Qwen/Qwen3-4B": _spec(36, 2560, (32, 8, 128), 9728, 151_936, True, **_QWEN3),
    "Qwen/Qwen3-8B": _spec(36, 4096, (32, 8, 128), 12_288, 151_936, False, **_QWEN3),
    "Qwen/Qwen3-30B-A3B": _spec(
        *(48, 2048, (32, 4, 128), 6144, 151_936, False), **_QWEN3, moe=MoESpec(experts=128, chosen=8, ffn=768)
    ),
}


def shape_of(path: str, key: str) -> DecoderSpec:
    """The shape of `smollm2`, a GGUF file, a Hugging Face folder, or a published model that is known by name.

    Nothing is downloaded, and no weights are read.

    Raises:
        ConfigError: a hub id that is not known here; `key` is where it stands in the config.
        DataError: the file or folder cannot be understood.
    """
    place = Path(path).expanduser()
    known = SHAPES.get(path) or SHAPES.get(f"{path}-Instruct")
    if known is not None and not place.exists():
        return known
    if path != "smollm2" and place.suffix != ".gguf" and not place.is_dir():
        raise ConfigError(
            f"{key}={path}: the planner downloads nothing, and does not know this shape: give a folder with its "
            f"config.json, or one of {', '.join(SHAPES)}"
        )
    return find_source(path).spec
