"""What a family of models is: a reader and a writer of its config, and where its tensors hold the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ppojax.models.families.config import HFConfig
from ppojax.models.families.layout import Rules
from ppojax.models.spec import DecoderSpec


@dataclass(frozen=True)
class Family:
    """One Hugging Face model type.

    Attributes:
        spec_from: turns a config into a spec. Raises DataError naming a setting that is not supported.
        config_from: turns a spec into a config that transformers 5 (and 4) loads. A spec that the family cannot
            express comes back as another one, which `families.family_for` notices.
        rules: where each parameter lies.
        unread: endings or beginnings of tensor names that are not part of the decoder.
        also_unread: more of them, by the config.
        exact: parameters that stay float32 in a file of a smaller type.
    """

    model_type: str
    spec_from: Callable[[HFConfig], DecoderSpec]
    config_from: Callable[[DecoderSpec], dict[str, Any]]
    rules: Rules
    unread: tuple[str, ...] = (".rotary_emb.inv_freq", ".self_attn.masked_bias")
    also_unread: Callable[[HFConfig], tuple[str, ...]] | None = None
    exact: frozenset[str] = frozenset()
