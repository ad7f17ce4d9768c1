"""The shape of a decoder, as data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ppojax.component import Component

Remat = Literal["none", "dots", "full"]


class DecoderSpec(Component):
    """A Llama-type decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    layers: int = Field(ge=1, description="number of transformer blocks")
    width: int = Field(ge=1, description="model width D")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int = Field(ge=1, description="key/value heads; divides heads")
    head_width: int = Field(ge=2, description="width of one head; even, for rotary positions")
    ffn: int = Field(ge=1, description="hidden width of the MLP")
    vocab: int = Field(ge=2, description="rows of the embedding")
    rope_theta: float = Field(default=10_000.0, gt=0, description="base of the rotary frequencies")
    norm_eps: float = Field(default=1e-5, gt=0, description="epsilon inside RMSNorm")
    tied: bool = Field(default=True, description="the head is the embedding")

    @model_validator(mode="after")
    def _consistent(self) -> DecoderSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_width % 2:
            raise ValueError(f"head_width ({self.head_width}) must be even for rotary positions")
        return self

    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the logical dimensions that a mesh may split."""
        return {
            "embed": self.width,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "ffn": self.ffn,
            "vocab": self.vocab,
        }
