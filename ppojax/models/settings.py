"""Settings of the actor's model and of the critic's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.errors import ConfigError
from ppojax.models.lora import LoRAConfig
from ppojax.models.spec import AttentionChoice, DecoderSpec, MoESpec, Remat, RopeSpec, StatisticsChoice

Dtype = Literal["float32", "bfloat16", "float16"]


class FreshSpec(Component):
    """Shape of a model trained from scratch; its vocabulary is the tokenizer's."""

    layers: int = Field(default=4, ge=1, description="number of transformer blocks")
    width: int = Field(default=128, ge=1, description="model width")
    heads: int = Field(default=4, ge=1, description="query heads")
    kv_heads: int = Field(default=4, ge=1, description="key/value heads; divides heads")
    ffn: int = Field(default=384, ge=1, description="hidden width of the MLP")
    rope_theta: float = Field(default=10_000.0, gt=0, description="base of the rotary frequencies")
    tied: bool = Field(default=True, description="the head is the embedding")
    moe: MoESpec | None = Field(default=None, description="experts in place of the MLP")

    def decoder(self, vocab: int) -> DecoderSpec:
        """Complete the shape with a vocabulary."""
        return DecoderSpec(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.width // self.heads,
            ffn=self.ffn,
            vocab=vocab,
            rope=RopeSpec(theta=self.rope_theta),
            tied=self.tied,
            moe=self.moe,
        )


class ModelConfig(Component):
    """The policy's model: pretrained (`path`) or from scratch (`fresh` and `tokenizer`)."""

    path: str | None = Field(
        default=None,
        description="smollm2 (the weights of the extra of that name), a .gguf file, a Hugging Face folder, or a hub id",
    )
    fresh: FreshSpec | None = Field(default=None, description="shape of a model from scratch, instead of path")
    tokenizer: Literal["char"] | None = Field(default=None, description="tokenizer of a model from scratch")
    chat_template: str = Field(
        default="auto",
        min_length=1,
        description="auto (the model's own, or its training variant where that rewrites earlier turns), training, or "
        "the path of a template",
    )
    dtype: Dtype = Field(
        default="float32",
        description="compute type; master weights are float32; float16 rounds 8 times finer than bfloat16, in a "
        "smaller range, for which losses are scaled",
    )
    remat: Remat = Field(
        default="full",
        description="what a block keeps for its backward pass: none (recompute nothing), dots (the matrix products), "
        "full (its input only)",
    )
    attention: AttentionChoice = Field(
        default="xla",
        description="what attends: xla; cudnn (flash attention, where it can; else XLA, and the log says why), not yet "
        "run on a GPU; auto is cudnn on a GPU and xla elsewhere",
    )
    statistics: StatisticsChoice | None = Field(
        default=None,
        description="what computes log-probabilities, entropies and divergences over the vocabulary: tiled (the "
        "default), reference (all logits at once, for tests), pallas_gpu, pallas_tpu, triton",
    )
    base_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type in which frozen weights are kept, with lora"
    )
    lora: LoRAConfig | None = Field(
        default=None, description="train adapters of low rank and freeze the rest; null: train everything"
    )

    def adapters(self) -> tuple[LoRAConfig, str]:
        """The adapters, and the path of the base that they belong to. Raises ConfigError where there are none."""
        if self.lora is None:
            raise ConfigError("adapter=true: model.lora is null, expected a run with adapters; export without adapter")
        if self.path is None:
            raise ConfigError(
                "adapter=true: the base is model.fresh, which is in no file, expected model.path; export without "
                "adapter, which merges"
            )
        return self.lora, self.path


class CutCritic(Component):
    """A critic cut from the actor: its embeddings and first blocks, and a new head."""

    type: Literal["cut"] = Field(default="cut", description="cut from the actor")
    layers: int = Field(default=6, ge=1, description="blocks taken from the actor's bottom")


class PretrainedCritic(Component):
    """A critic that starts from another checkpoint with the actor's tokenizer."""

    type: Literal["pretrained"] = Field(default="pretrained", description="from a checkpoint")
    path: str = Field(description="as model.path")


class FreshCritic(Component):
    """A critic from scratch, with the actor's tokenizer."""

    type: Literal["fresh"] = Field(default="fresh", description="from scratch")
    shape: FreshSpec = Field(default=FreshSpec(), description="its shape")


class FittedCritic(Component):
    """A critic that was fitted to stored rollouts, its head with it."""

    type: Literal["fitted"] = Field(default="fitted", description="from the folder of a fitted critic")
    path: str = Field(description="folder that `python -m ppojax.critic_fit` wrote")


CriticModelConfig = Annotated[CutCritic | PretrainedCritic | FreshCritic | FittedCritic, Field(discriminator="type")]
