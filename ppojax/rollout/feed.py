"""Given tokens into chosen slots: ragged on the host, in few shapes on the device, so that few programs compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ppojax.mesh import row_shards
from ppojax.models.forward import Params
from ppojax.rollout.sampler import SamplerDef, Slots, extend, prefill, share

CHUNK = 512  # tokens of a row that are read at once, at most
PAIRS = 2**26  # query-key pairs of a head in one call, at most, which bounds the memory of attention scores
FEW = 128  # tokens that are read in every slot rather than by a program for fewer slots


def widths(count: int, smallest: int, largest: int = CHUNK) -> list[int]:
    """Cut `count` tokens into widths `smallest * 2^k` up to `largest`, padding at most a third of the larger ones."""
    out = []
    while count > 0:
        width = smallest
        while width < min(count, largest):
            width *= 2
        if width >= 8 * smallest and 4 * count <= 3 * width:
            width //= 2
        out.append(width)
        count -= width
    return out


def sizes(slots: int, unit: int) -> list[int]:
    """Rows of a batch: every slot, a 4th of them, a 16th, ... in multiples of `unit`."""
    out = [slots]
    while out[-1] > unit:
        out.append(-(-out[-1] // (4 * unit)) * unit)
    return out


def heights(count: int, slots: int, unit: int) -> list[int]:
    """Cut `count` rows into batches of one size, at most half filler but for the smallest size."""
    size = min((size for size in sizes(slots, unit) if 2 * size >= count), default=slots)
    return [size] * -(-count // size)


def feed(
    params: Params,
    slots: Slots,
    rows: Mapping[int, Sequence[int]],
    *,
    sampler: SamplerDef,
    smallest: int,
    prompt: bool,
) -> Slots:
    """Append tokens to the rows in the slots that are the keys; prompts begin new rows there.

    Long ones are read in chunks. Shapes are powers of two times `smallest` by powers of four of the slots: whatever the
    lengths are, at most W H programs of `prefill`, 2 W H of `extend` (prompts and observations are told apart) and H of
    `share`, with W = 1 + ceil(log2(CHUNK / smallest)) widths and H = 1 + ceil(log4(slots)) heights.
    """
    B, start = slots.length_B.shape[0], 0
    for width in widths(max(map(len, rows.values())), smallest):
        left = {b: ids[start : start + width] for b, ids in rows.items() if len(ids) > start}
        fresh = prompt and start == 0
        for part, size in _batches(left, B, width, sampler, 0 if fresh else sampler.positions):
            token_RT, count_R, slot_R = _padded(part, size, width, B, row_shards(sampler.mesh))
            if fresh:
                slots = prefill(params, slots, token_RT, count_R, slot_R, sampler=sampler)
            else:
                arrays = (token_RT, count_R, slot_R)
                slots = extend(params, slots, *arrays, sampler=sampler, whole=size == B, prompt=prompt)
        start += width
    return slots


Rows = dict[int, Sequence[int]]


def _batches(rows: Rows, slots: int, width: int, sampler: SamplerDef, past: int) -> Iterator[tuple[Rows, int]]:
    """Deal rows out to batches, each with its size; to each device no more than its part of a batch."""
    if slots * width <= FEW:
        yield rows, slots
        return
    unit = row_shards(sampler.mesh)
    most = max(PAIRS // (width * (width + past)) // unit, 1) * unit
    dealt = _by_device(rows, slots, unit)
    for size in heights(max(map(len, dealt)) * unit, min(slots, most), unit):
        part = size // unit
        yield {b: rows[b] for own in dealt for b in own[:part]}, size
        dealt = [own[part:] for own in dealt]


def _by_device(rows: Iterable[int], slots: int, devices: int) -> list[list[int]]:
    """Slots by the device that holds them, each in the order in which they come."""
    dealt: list[list[int]] = [[] for _ in range(devices)]
    for b in rows:
        dealt[device_of(b, slots, devices)].append(b)
    return dealt


def device_of(slot: int, slots: int, devices: int) -> int:
    """The device of a slot: they are split over devices in order."""
    return slot * devices // slots


def _padded(rows: Rows, size: int, width: int, slots: int, devices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, counts and slots of a batch, each row on the device of its slot; one of all slots has them in order."""
    whole = size == slots
    token_RT, count_R = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
    slot_R = np.arange(size, dtype=np.int32) if whole else np.full(size, slots, np.int32)
    for device, own in enumerate(_by_device(rows, slots, devices)):
        for r, b in enumerate(own):
            at, ids = b if whole else device * (size // devices) + r, rows[b]
            token_RT[at, : len(ids)], count_R[at], slot_R[at] = ids, len(ids), b
    return token_RT, count_R, slot_R


def share_prompts(
    slots: Slots, sources: Mapping[int, int], lengths: Mapping[int, int], *, sampler: SamplerDef
) -> Slots:
    """Begin new rows in the slots that are the keys with the prompts of other slots of their device, in this order."""
    B, devices = slots.length_B.shape[0], row_shards(sampler.mesh)
    dealt = _by_device(sources, B, devices)
    size = min(size for size in sizes(B, devices) if size >= devices * max(map(len, dealt)))
    source_R, target_R, length_R = np.zeros(size, np.int32), np.full(size, B, np.int32), np.zeros(size, np.int32)
    for device, own in enumerate(dealt):
        for r, target in enumerate(own, device * (size // devices)):
            source = sources[target]
            assert device_of(source, B, devices) == device, "a prompt is shared on one device"
            source_R[r], target_R[r], length_R[r] = source, target, lengths[target]
    return share(slots, source_R, target_R, length_R, sampler=sampler)
