"""The shape of a decoder, as data: one frozen description that covers every family."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ppojax.component import Component

Remat = Literal["none", "dots", "full"]
AttentionChoice = Literal["auto", "xla", "cudnn"]
StatisticsChoice = Literal["reference", "tiled", "pallas_gpu", "pallas_tpu", "triton"]  # ppojax.kernels' own names
Activation = Literal["silu", "gelu_tanh", "clipped_swiglu"]
Scoring = Literal["softmax", "softmax_chosen", "sigmoid"]


class RopeSpec(Component):
    """Rotary positions: their base, and how the frequencies are stretched for long contexts."""

    theta: float = Field(default=10_000.0, gt=0, description="base of the rotary frequencies")
    scaling: Literal["none", "linear", "llama3", "yarn"] = Field(default="none", description="how they are stretched")
    factor: float = Field(default=1.0, gt=0, description="the stretch")
    original: int = Field(default=8192, ge=1, description="llama3, yarn: positions the model was first trained on")
    low: float = Field(default=1.0, gt=0, description="llama3: wavelengths over original / low are stretched in full")
    high: float = Field(default=4.0, gt=0, description="llama3: wavelengths under original / high are left alone")
    beta_fast: float = Field(default=32.0, gt=0, description="yarn: rotations over which a frequency is left alone")
    beta_slow: float = Field(default=1.0, gt=0, description="yarn: rotations under which it is stretched in full")
    truncate: bool = Field(default=True, description="yarn: the ends of the ramp are rounded to whole dimensions")
    magnitude: float = Field(default=1.0, gt=0, description="yarn: factor on cos and sin")


class MLASpec(Component):
    """Multi-head latent attention: queries, keys and values come out of low-rank latents (arXiv 2405.04434)."""

    q_rank: int | None = Field(default=None, ge=1, description="rank of the query latent; None: a full projection")
    kv_rank: int = Field(ge=1, description="rank of the latent that keys and values share")
    nope_width: int = Field(ge=1, description="part of a head's query and key without positions")
    rope_width: int = Field(ge=2, description="part with rotary positions, one key for all heads; even")
    value_width: int = Field(ge=1, description="width of a head's value")


class MoESpec(Component):
    """A mixture of experts in place of the MLP."""

    experts: int = Field(ge=1, description="experts E")
    chosen: int = Field(ge=1, description="experts K that each token goes to")
    ffn: int = Field(ge=1, description="hidden width of one expert")
    shared_ffn: int = Field(default=0, ge=0, description="hidden width of the experts that every token goes to, in all")
    dense_first: int = Field(default=0, ge=0, description="blocks at the bottom that keep a dense MLP")
    scoring: Scoring = Field(
        default="softmax",
        description="router scores: softmax over all experts, softmax over the chosen ones, or sigmoid of each",
    )
    normalise: bool = Field(default=True, description="weights of the chosen are divided by their sum")
    groups: int = Field(default=1, ge=1, description="groups of experts; a token may use only some of them")
    groups_chosen: int = Field(default=1, ge=1, description="groups that a token may use")
    scale: float = Field(default=1.0, gt=0, description="factor on the weights of the chosen")
    router_bias: bool = Field(default=False, description="the router's logits have a bias")
    choice_bias: bool = Field(default=False, description="a bias on the scores that only the choice sees")
    expert_bias: bool = Field(default=False, description="the experts' products have biases")

    @model_validator(mode="after")
    def _consistent(self) -> MoESpec:
        if self.chosen > self.experts:
            raise ValueError(f"moe.chosen ({self.chosen}) is over moe.experts ({self.experts})")
        if self.experts % self.groups or self.groups_chosen > self.groups:
            raise ValueError(
                f"moe.groups ({self.groups}) must divide moe.experts ({self.experts}) and not be under "
                f"moe.groups_chosen ({self.groups_chosen})"
            )
        allowed = self.experts // self.groups * self.groups_chosen
        if self.chosen > allowed:
            raise ValueError(
                f"moe.chosen ({self.chosen}) is over the {allowed} experts of moe.groups_chosen = "
                f"{self.groups_chosen} of {self.groups} groups"
            )
        return self


class DecoderSpec(Component):
    """A decoder: RMSNorm, rotary positions, (grouped-query or latent) attention, gated MLP or experts."""

    layers: int = Field(ge=1, description="number of transformer blocks")
    width: int = Field(ge=1, description="model width D")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int = Field(ge=1, description="key/value heads; divides heads")
    head_width: int = Field(ge=2, description="width of a head; even, for rotary positions; unused with mla")
    ffn: int = Field(ge=1, description="hidden width of the dense MLP")
    vocab: int = Field(ge=2, description="rows of the embedding")
    rope: RopeSpec = Field(default=RopeSpec(), description="rotary positions")
    norm_eps: float = Field(default=1e-5, gt=0, description="epsilon inside RMSNorm")
    tied: bool = Field(default=True, description="the head is the embedding")

    activation: Activation = Field(default="silu", description="of the gate; clipped_swiglu is that of gpt-oss")
    norm_offset: bool = Field(default=False, description="norms multiply by 1 + weight (Gemma)")
    sandwich: bool = Field(default=False, description="norms behind attention and MLP too (Gemma)")
    embed_scale: float = Field(default=1.0, gt=0, description="factor on embeddings, rounded to the compute type")
    qk_norm: bool = Field(default=False, description="RMSNorm on each head's query and key, before the rotation")
    qkv_bias: bool = Field(default=False, description="bias on queries, keys and values")
    o_bias: bool = Field(default=False, description="bias on the output projection")
    mlp_bias: bool = Field(default=False, description="bias on the MLP's products")
    sinks: bool = Field(default=False, description="a learned logit for each head that takes attention and gives 0")
    attention_scale: float | None = Field(default=None, gt=0, description="factor on scores; None: key_width^-1/2")
    attention_softcap: float | None = Field(default=None, gt=0, description="scores become cap * tanh(score / cap)")
    logit_softcap: float | None = Field(default=None, gt=0, description="logits become cap * tanh(logit / cap)")
    window: int | None = Field(default=None, ge=1, description="tokens seen in blocks with a sliding window, itself in")
    windowed: tuple[bool, ...] = Field(default=(), description="which blocks have the window; empty: none")
    local_rope: RopeSpec | None = Field(default=None, description="rotary positions of blocks with a window, if other")
    unrotated: tuple[bool, ...] = Field(default=(), description="which blocks have no positions; empty: none")
    mla: MLASpec | None = Field(default=None, description="latent attention")
    moe: MoESpec | None = Field(default=None, description="experts instead of the MLP")

    @model_validator(mode="after")
    def _consistent(self) -> DecoderSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.rope_width % 2:
            raise ValueError(f"head_width ({self.rope_width}) must be even for rotary positions")
        for name, blocks in (("windowed", self.windowed), ("unrotated", self.unrotated)):
            if blocks and len(blocks) != self.layers:
                raise ValueError(f"{name} has {len(blocks)} entries, expected layers = {self.layers}")
        if any(self.windowed) and self.window is None:
            raise ValueError("windowed names blocks with a sliding window, but window is not set")
        if self.mla is not None and self.kv_heads != self.heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must be heads ({self.heads}) with latent attention")
        if self.moe is not None and self.moe.dense_first >= self.layers:
            raise ValueError(f"moe.dense_first ({self.moe.dense_first}) leaves no block of {self.layers} for experts")
        return self

    @property
    def key_width(self) -> int:
        """Width of one head's query and key."""
        return self.head_width if self.mla is None else self.mla.nope_width + self.mla.rope_width

    @property
    def rope_width(self) -> int:
        """Width of the part of a head that is rotated."""
        return self.head_width if self.mla is None else self.mla.rope_width

    @property
    def value_width(self) -> int:
        """Width of one head's value."""
        return self.head_width if self.mla is None else self.mla.value_width

    @property
    def moe_layers(self) -> int:
        """Blocks with experts; they are the last ones."""
        return 0 if self.moe is None else self.layers - self.moe.dense_first

    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the logical dimensions that a mesh may split; what stands in brackets tells two of a kind apart."""
        sizes = {
            "embed": self.width,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "ffn": self.ffn,
            "vocab": self.vocab,
        }
        if self.moe is not None:
            sizes |= {"experts": self.moe.experts, "ffn (of an expert)": self.moe.ffn}
            if self.moe.shared_ffn:
                sizes["ffn (shared)"] = self.moe.shared_ffn
        return sizes
