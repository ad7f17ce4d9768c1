"""Settings of the actor's and the critic's updates."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import jax, jnp, optax
from ppojax.losses import ValueLoss
from ppojax.losses.router import RouterLoss
from ppojax.mesh import MeshConfig
from ppojax.models.lora import LoRAConfig
from ppojax.models.perturb import NAME, Perturb
from ppojax.models.settings import CriticModelConfig, CutCritic
from ppojax.models.value_head import LinearHead, ValueHead

Split = Literal["none", "prompts", "responses"]
Offload = Literal["none", "optimizer", "all"]


class OptimizerConfig(Component):
    """AdamW with clipping by global norm, a linear warm-up and a schedule after it."""

    learning_rate: float = Field(default=1e-6, gt=0, description="peak learning rate")
    warmup_steps: int = Field(default=0, ge=0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="what follows the warm-up"
    )
    decay_steps: int = Field(default=0, ge=0, description="optimizer steps of the decay, for cosine and linear")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="global norm to which gradients are clipped")
    over_data: bool = Field(
        default=False,
        description="split the moments over mesh.data too, which otherwise holds them as often as the parameters (ZeRO "
        "stage 1); mesh.fsdp x mesh.data then divides the model's width",
    )

    def learning_rate_at(self, step: jax.Array) -> jax.Array:
        """Evaluate the schedule at an optimizer step, float32."""
        return jnp.asarray(self.build_schedule()(step), jnp.float32)

    def build_schedule(self) -> optax.Schedule:
        """Warm-up, then constant, or decay to zero over `decay_steps`."""
        peak, decay = self.learning_rate, max(self.decay_steps, 1)
        after = {
            "constant": optax.constant_schedule(peak),
            "cosine": optax.cosine_decay_schedule(peak, decay),
            "linear": optax.linear_schedule(peak, 0.0, decay),
        }[self.schedule]
        if not self.warmup_steps:
            return after
        # The first update already moves: lr is peak/(n+1) at step 0 and reaches the peak after n updates.
        warmup = optax.linear_schedule(peak / (self.warmup_steps + 1), peak, self.warmup_steps)
        return optax.join_schedules([warmup, after], [self.warmup_steps])

    def build(self) -> optax.GradientTransformation:
        """Clip by global norm, then AdamW. What no gradient reaches, a router's `choice_bias`, does not decay."""
        return optax.chain(
            optax.clip_by_global_norm(self.max_grad_norm),
            optax.adamw(
                self.build_schedule(),
                b1=self.beta1,
                b2=self.beta2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=_decayed,
            ),
        )


_ATTENTION = re.compile(r"(attn_norm|post_attn_norm|sinks|[qkvo](_bias|_norm|_a|_b|_a_norm)?|kv_(a|b)(_norm)?)$")


def is_attention(name: str) -> bool:
    """Whether a parameter of a block belongs to its attention."""
    return bool(_ATTENTION.match(name))


def _attention(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: is_attention(path[-1].key), params)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "choice_bias", params)


class ActorConfig(Component):
    """The policy's update."""

    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="the policy's optimizer")
    router: RouterLoss = Field(default=RouterLoss(), description="losses on the routers of a model with experts")
    offload: Literal["none", "optimizer"] = Field(
        default="none",
        description="what rests in the host's memory but for the policy's own update: nothing, or the optimizer state",
    )
    perturb: Perturb | None = Field(
        default=None,
        description="noise of learnable size on what each block reads, in the update only (ALP); null: none",
    )

    def build_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the policy, and of the deviations of its noise."""
        return with_perturb(self.optimizer, self.perturb)


def with_perturb(optimizer: OptimizerConfig, perturb: Perturb | None) -> optax.GradientTransformation:
    """Add Adam for `log_sigma`: it does not decay, and is in no norm that is clipped."""
    if perturb is None:
        return optimizer.build()
    own = optax.adam(perturb.learning_rate, b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.eps)
    return optax.chain(optax.masked(optimizer.build(), _weights), optax.masked(own, _deviations))


def _weights(params: Any) -> Any:
    return {name: name != NAME for name in params}


def _deviations(params: Any) -> Any:
    return {name: name == NAME for name in params}


class CriticConfig(Component):
    """The critics and their update; built only when the advantage estimator needs values."""

    model: CriticModelConfig = Field(default=CutCritic(), description="where the critic comes from")
    head: ValueHead = Field(default=LinearHead(), description="how a value is read off the critic, and fitted")
    mesh: MeshConfig | None = Field(
        default=None,
        description="the actor's devices in another order of axes, for the critics: a small critic may have rows over "
        "data where the actor is split over fsdp or tensor; null: mesh",
    )
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(learning_rate=1e-5), description="the critic's optimizer"
    )
    offload: Offload = Field(
        default="none",
        description="what rests in the host's memory but for the critics' own update: nothing, the optimizer state, or "
        "all (the parameters come back once more when rows are scored)",
    )
    head_lr_multiplier: float = Field(default=1.0, gt=0, description="learning rate of the new head, times the trunk's")
    loss: ValueLoss = Field(default=ValueLoss(), description="regression of the values on the returns")
    updates: int = Field(
        default=1, ge=1, description="passes of the critic over the step's rows for each pass of the actor"
    )
    warmup_steps: int = Field(default=0, ge=0, description="training steps in which only the critic learns")
    count: int = Field(default=1, ge=1, description="critics in the ensemble; advantages are made of their mean")
    lora: LoRAConfig | None = Field(
        default=None,
        description="train adapters of low rank and the head, freeze the rest (cut from an actor that is trained "
        "whole: the actor as it was loaded, before any warm start); null: train everything",
    )
    split: Split = Field(
        default="none",
        description="what each of several critics learns from: none: all rows; prompts: every count-th prompt; "
        "responses: every count-th episode of each prompt",
    )
    freeze: Literal["none", "attention"] = Field(
        default="none",
        description="what of the critic is not trained; attention: its attention blocks, where SAO finds the gradient "
        "norm comes from",
    )
    privileged: int = Field(
        default=0,
        ge=0,
        description="tokens that the critic, and it alone, is shown of what the environment knows: the answer, the "
        "right moves; 0 for nothing",
    )
    noise: float = Field(
        default=0.01, ge=0, description="about how much the values of several critics differ at the start"
    )

    def build_optimizer(self) -> optax.GradientTransformation:
        """The optimizer, with its own learning rate for the value head, which starts from nothing."""
        head = {"trunk": False, "value_head": True}
        train = optax.chain(self.optimizer.build(), optax.masked(optax.scale(self.head_lr_multiplier), head))
        if self.freeze == "none":
            return train
        # Before, so that the norm which is clipped is of what is trained; behind, because weights decay.
        still = optax.masked(optax.set_to_zero(), _attention)
        return optax.chain(still, train, still)


class UpdateConfig(Component):
    """How a step's rows become optimizer steps."""

    epochs: int = Field(default=1, ge=1, description="passes over the step's rows")
    minibatches: int = Field(default=1, ge=1, description="optimizer steps a pass")
    microbatch_rows: int = Field(default=8, ge=1, description="rows of one forward and backward pass")
    shared_prefix: bool = Field(
        default=True,
        description="read the prompt that a group's rows share once; minibatches then keep groups together",
    )
    max_skipped: int = Field(
        default=5, ge=1, description="non-finite updates in a row after which the run stops (exit 4)"
    )


class WarmStartConfig(Component):
    """Supervised steps on the environment's own demonstrations before reinforcement learning."""

    steps: int = Field(default=200, ge=1, description="optimizer steps")
    rows: int = Field(default=64, ge=1, description="demonstrations a step")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(learning_rate=1e-3), description="optimizer of these steps"
    )
    corrupt: float = Field(default=0.0, ge=0, le=1, description="share of demonstrations made wrong")
