"""The sampler's slots and who holds them: whose tokens are read into which, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from ppojax.mesh import row_shards
from ppojax.models.forward import Params
from ppojax.rollout.episode import Episode
from ppojax.rollout.feed import device_of, feed, share_prompts
from ppojax.rollout.sampler import SamplerDef, empty


class Board:
    """A fixed number of slots; an episode keeps its slot to its end.

    Attributes:
        slots: the sampler's state.
        held: the episode in each slot.
    """

    def __init__(self, params: Params, sampler: SamplerDef, count: int, *, smallest: int, share: bool) -> None:
        """Make empty slots.

        Args:
            params: what the sampler reads.
            sampler: how.
            count: slots.
            smallest: lengths are padded to this times a power of two.
            share: episodes that begin alike have their prompt read once.
        """
        self._params, self._sampler, self._smallest, self._shares = params, sampler, smallest, share
        self.slots = empty(params, sampler=sampler, count=count)
        self.held: list[Episode | None] = [None] * count
        self._began: list[list[int] | None] = [None] * count  # the prompt of its last row
        self._observed: dict[int, Sequence[int]] = {}  # tokens to be appended
        self._restarted: dict[int, Sequence[int]] = {}  # rows that begin behind a cut
        self._over: dict[int, Episode] = {}  # rows that are over, whose slots still hold their experts

    def slot_of(self, episode: Episode) -> int:
        """The slot that an episode holds."""
        return self.held.index(episode)

    def append(self, episode: Episode, ids: Sequence[int]) -> None:
        """Have tokens read behind the episode's row, with the next `read`."""
        if ids:
            self._observed[self.slot_of(episode)] = ids

    def restart(self, episode: Episode) -> None:
        """Have the episode's new row read from its start, with the next `read`."""
        slot = self.slot_of(episode)
        self._restarted[slot] = self._began[slot] = list(episode.token)

    def leave(self, episode: Episode) -> None:
        """Let the slot of an episode go that is over, if it has one."""
        if episode in self.held:
            slot = self.slot_of(episode)
            self.held[slot], self._over[slot] = None, episode

    def keep_experts_of(self, episode: Episode) -> None:
        """Fetch the experts that read an episode's row so far."""
        self._over[self.slot_of(episode)] = episode
        self.keep_experts()

    def keep_experts(self) -> None:
        """Fetch the experts that read the rows which are over, before others take their slots."""
        if self.slots.routed_LBSK is not None and self._over:
            routed_BSLK = np.moveaxis(jax.device_get(self.slots.routed_LBSK), 0, 2)
            for slot, episode in self._over.items():
                episode.routed = routed_BSLK[slot, : len(episode.token)].copy()
        self._over = {}

    def admit(self, ready: list[Episode]) -> list[Episode]:
        """Give free slots to the first of the waiting episodes, and return these, taken out of `ready`.

        Prompts that a slot has begun with are taken from there.
        """
        free = [b for b, episode in enumerate(self.held) if episode is None]
        if not (free and ready):
            return []
        self.keep_experts()
        ready.sort(key=lambda episode: episode.number)
        entering = ready[: len(free)]
        del ready[: len(free)]
        new: dict[int, Sequence[int]] = {}
        before: dict[int, int] = {}  # to each slot, from where: prompts of earlier rows, and those that are read now
        now: dict[int, int] = {}
        for episode in entering:
            slot, source = self._place(episode.token, free, ready)
            free.remove(slot)
            if source is None:
                new[slot] = episode.token
            else:
                (now if source in new or source in now else before)[slot] = source
            self.held[slot], self._began[slot] = episode, list(episode.token)
        self._share(before)
        self._feed(new, prompt=True)
        self._share(now)
        return entering

    def read(self) -> None:
        """Read what was asked to be read."""
        self._feed(self._restarted, prompt=True)
        self._feed(self._observed, prompt=False)
        self._restarted, self._observed = {}, {}

    def read_now(self, slot: int, ids: Sequence[int]) -> None:
        """Read tokens behind the row in a slot."""
        self._feed({slot: ids}, prompt=False)

    def _place(self, prompt: list[int], free: list[int], ready: list[Episode]) -> tuple[int, int | None]:
        """A free slot for a row, and the slot that it takes its prompt from, which is on the same device.

        None where no device with a free slot holds the prompt. It is then read on the device that has most room, so
        that others that begin so can follow.
        """
        wanted = [episode.token for episode in ready]
        room = Counter(map(self._device, free))
        held = [b for b, began in enumerate(self._began) if began == prompt] if self._shares else []
        held = [b for b in held if room[self._device(b)]]
        own = next((b for b in held if b in free), None)
        if own is not None:
            return own, own
        device = self._device(held[0]) if held else max(room, key=lambda device: room[device])
        near = [b for b in free if self._device(b) == device]
        # If possible one that holds no prompt of a waiting episode.
        slot = next((b for b in near if self._began[b] not in wanted), near[0])
        return slot, held[0] if held else None

    def _device(self, slot: int) -> int:
        return device_of(slot, len(self.held), row_shards(self._sampler.mesh))

    def _share(self, sources: Mapping[int, int]) -> None:
        if sources:
            lengths = {slot: len(self._began[slot] or ()) for slot in sources}
            self.slots = share_prompts(self.slots, sources, lengths, sampler=self._sampler)

    def _feed(self, rows: Mapping[int, Sequence[int]], *, prompt: bool) -> None:
        if rows:
            how = {"sampler": self._sampler, "smallest": self._smallest, "prompt": prompt}
            self.slots = feed(self._params, self.slots, rows, **how)
