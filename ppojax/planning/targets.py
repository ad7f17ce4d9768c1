"""What a run is planned for: chips, as their vendors describe them, and how many of them lie together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from ppojax.errors import ConfigError

Platform = Literal["cuda", "tpu", "cpu"]
GB = 1e9


@dataclass(frozen=True)
class Chip:
    """One device. Rates are a second, in one direction, as the vendor states them; nothing here was measured.

    Attributes:
        name: what jax calls the device.
        flops: dense bfloat16 FLOP/s.
        memory: bytes.
        bandwidth: bytes/s of that memory.
        link: bytes/s a device to the others of its host (NVLink), or around a ring of its slice (two ICI links).
        network: bytes/s a device to other hosts; None: the link joins all of a slice.
        host: devices of a host, at most.
        source: where the figures are from.
    """

    name: str
    platform: Platform
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float | None
    host: int
    source: str


CHIPS = {
    "h200": Chip(
        *("NVIDIA H200", "cuda", 989e12, 141 * GB, 4.8e12, 450 * GB, 50 * GB, 8),
        source="NVIDIA H200 data sheet: SXM, NVLink 900 GB/s in both directions; one 400 Gb/s InfiniBand port a GPU",
    ),
    "h100": Chip(
        *("NVIDIA H100", "cuda", 989e12, 80 * GB, 3.35e12, 450 * GB, 50 * GB, 8),
        source="NVIDIA H100 data sheet: SXM, NVLink 900 GB/s in both directions; one 400 Gb/s InfiniBand port a GPU",
    ),
    "v5e": Chip(
        *("TPU v5 lite", "tpu", 197e12, 16 * 2.0**30, 0.819e12, 100 * GB, None, 8),
        source="Cloud TPU documentation, v5e: 400 GB/s of ICI a chip in both directions, over 4 ports",
    ),
    "v5p": Chip(
        *("TPU v5", "tpu", 459e12, 95 * 2.0**30, 2.765e12, 200 * GB, None, 4),
        source="Cloud TPU documentation, v5p: 1200 GB/s of ICI a chip in both directions, over 6 ports",
    ),
    "v6e": Chip(
        *("TPU v6 lite", "tpu", 918e12, 32 * 2.0**30, 1.638e12, 200 * GB, None, 8),
        source="Cloud TPU documentation, v6e: 800 GB/s of ICI a chip in both directions, over 4 ports",
    ),
    "cpu": Chip(
        *("cpu", "cpu", 0.2e12, 16 * 2.0**30, 20 * GB, 10 * GB, None, 4096),
        source="none: round figures of a small host, so that plans can be tried out; its times say nothing",
    ),
}
SPELLINGS = "h200:8, h200:8x8 (hosts x GPUs), h100:..., v5e:2x4, v5p:2x2x2, v6e:2x4 (chips along each side), cpu:8"


@dataclass(frozen=True)
class Target:
    """So many chips of a kind. `sides`: hosts and devices of each; of a TPU slice, chips along each side."""

    kind: str
    sides: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What all of its devices are."""
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """Devices in all."""
        return math.prod(self.sides)

    @property
    def host_size(self) -> int:
        """Devices within the reach of the fast link."""
        return self.size if self.chip.network is None else self.sides[-1]

    def __str__(self) -> str:
        sides = self.sides[1:] if self.chip.platform != "tpu" and self.sides[0] == 1 else self.sides
        return f"{self.kind}:{'x'.join(map(str, sides))}"


def parse_target(text: str) -> Target:
    """Read `KIND:N`, `KIND:HOSTSxGPUS` or, for a TPU slice, `KIND:AxB[xC]`.

    Raises:
        ConfigError: the kind is not known, or no machine has that form.
    """
    kind, colon, form = text.strip().lower().partition(":")
    if kind not in CHIPS:
        raise ConfigError(
            f"target={text}: {kind or 'nothing'} is not known to the planner, expected one of {', '.join(CHIPS)}: "
            f"write {SPELLINGS}"
        )
    chip = CHIPS[kind]
    if colon and not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", form):
        raise ConfigError(f"target={text}: expected whole numbers behind {kind}: write {SPELLINGS}")
    sides = tuple(map(int, form.split("x"))) if form else (1,)
    if chip.platform == "tpu":
        wanted = 3 if kind == "v5p" else 2
        if len(sides) != wanted:
            example = "2x2x2" if wanted == 3 else "2x4"
            raise ConfigError(f"target={text}: a {kind} slice has {wanted} sides: write {kind}:{example}")
        return Target(kind, sides)
    if len(sides) > 2:
        raise ConfigError(f"target={text}: expected hosts x devices: write {kind}:8 or {kind}:8x8")
    sides = sides if len(sides) == 2 else (1, *sides)
    if sides[1] > chip.host:
        raise ConfigError(
            f"target={text}: a host holds at most {chip.host} of {kind}: write {kind}:{-(-sides[1] // chip.host)}x"
            f"{chip.host}"
        )
    return Target(kind, sides)
