"""How much arithmetic a model's update is, by formula: a compiler counts the body of a scan once."""

from __future__ import annotations

import math

from ppojax.models import parameters
from ppojax.models.spec import DecoderSpec
from ppojax.types import Experience, Layout

# Dense bfloat16 peak of one device in FLOP/s, from the vendors' data sheets, by what jax calls the device.
PEAK = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def block_weights(spec: DecoderSpec, experts: bool) -> float:
    """Weights of one block's matrices that a token meets: of E experts, K."""
    total = 0.0
    for name, leaf in parameters.block(spec, experts).items():
        share = spec.moe.chosen / spec.moe.experts if name.startswith("expert_") and spec.moe is not None else 1.0
        total += math.prod(leaf.shape) * share
    return total


def update_flops(spec: DecoderSpec, positions: int, pairs: int, scored: int) -> float:
    """FLOPs of one forward and backward pass: 6 for each weight that a position meets, attention, and the head.

        6 * (positions * weights + scored * V * D) + 6 * L * H * (F + Fv) * pairs

    after Kaplan et al. (arXiv 2001.08361) and PaLM (arXiv 2204.02311, appendix B). What rematerialisation computes
    again is not counted. `positions` tokens are read, `scored` of them meet the head, `pairs` is the number of (query,
    key) places, masked ones included.
    """
    with_experts = spec.moe_layers
    weights = with_experts * block_weights(spec, True) if with_experts else 0.0
    if spec.layers > with_experts:
        weights += (spec.layers - with_experts) * block_weights(spec, False)
    attention = spec.layers * spec.heads * (spec.key_width + spec.value_width) * pairs
    return 6.0 * (positions * weights + scored * spec.vocab * spec.width + attention)


def experience_flops(spec: DecoderSpec, experience: Experience, layout: Layout) -> float:
    """FLOPs of one pass of the policy's update: padding is counted, a shared prompt once."""
    rows, length = experience.token_BT.shape
    own, prompts = length - layout.prefix, rows // layout.group  # what is read of a row, and shared prompts
    positions = rows * own + prompts * layout.prefix
    pairs = rows * own * length + prompts * layout.prefix**2
    return update_flops(spec, positions, pairs, experience.action_index_BA.size)


def peak_flops(device_kind: str) -> float | None:
    """The bfloat16 peak of a device by its name; None where it is not known, as for a CPU."""
    found = [name for name in PEAK if device_kind.startswith(name)]
    return PEAK[max(found, key=len)] if found else None
