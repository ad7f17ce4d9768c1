"""How long a step takes, by arithmetic: FLOPs, bytes read and bytes sent over what the chips state.

    seconds = max(FLOPs / (0.6 peak), bytes / (0.8 bandwidth)) + sum over axes of bytes sent / (0.8 of their link)

Nothing is taken to overlap with collectives. The shares of peak are assumptions, not measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ppojax.mesh import AXES, MeshConfig
from ppojax.models.flops import update_flops
from ppojax.models.spec import DecoderSpec
from ppojax.planning.targets import Chip, Target

REACHED_FLOPS, REACHED_BANDWIDTH, REACHED_LINK = 0.6, 0.8, 0.8
Axes = tuple[str, ...]


class Work(NamedTuple):
    """What one device does in a part of a step.

    Attributes:
        flops: computed, what rematerialisation computes again among them.
        bytes: moved between chip and memory.
        sent: bytes sent to other devices, by the mesh axes along which.
    """

    flops: float
    bytes: float
    sent: Mapping[Axes, float]


def forward_flops(spec: DecoderSpec, positions: int, pairs: int, scored: int) -> float:
    """FLOPs of a forward pass: a third of `ppojax.models.flops.update_flops`, whose arguments these are."""
    return update_flops(spec, positions, pairs, scored) / 3


def seconds(work: Work, target: Target, mesh: MeshConfig) -> float:
    """Time of a part of a step on each device (see the top of this file)."""
    chip = target.chip
    computing = work.flops / (REACHED_FLOPS * chip.flops)
    reading = work.bytes / (REACHED_BANDWIDTH * chip.bandwidth)
    return max(computing, reading) + sending(work.sent, target, mesh)


def sending(sent: Mapping[Axes, float], target: Target, mesh: MeshConfig) -> float:
    """Time of the collectives alone."""
    return math.fsum(size / (REACHED_LINK * link_of(axes, target, mesh)) for axes, size in sent.items())


def link_of(axes: Axes, target: Target, mesh: MeshConfig) -> float:
    """Bytes/s that a device sends along these axes: over the network as soon as their devices span hosts."""
    chip = target.chip
    if chip.network is None:
        return chip.link
    # A group spans its outermost axis: its size times the devices between neighbours along it.
    outermost = next((n for n, axis in enumerate(AXES) if axis in axes or "?" in axes), len(AXES))
    return chip.link if math.prod(mesh.shape[outermost:]) <= target.host_size else chip.network


def mfu(flops: float, seconds: float, devices: int, chip: Chip) -> float:
    """Model FLOPs utilisation: FLOPs by formula, nothing computed twice, over what the devices could do in that time.

        flops / (seconds * devices * peak)

    with the FLOPs of `update_flops` and of `forward_flops`, and the dense bfloat16 peak (arXiv 2204.02311, appendix B).
    """
    return flops / (seconds * devices * chip.flops)
