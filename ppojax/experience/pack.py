"""From ragged rows on the host to arrays on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import jax
import numpy as np

from ppojax.mesh import shard_rows
from ppojax.types import Ending, Experience, Layout, Recorded, Row

PLAIN = Layout()


def _prefix(row: Row) -> int:
    """Tokens before the first action; a row that failed before it had one is all prompt."""
    return int(row.action.argmax()) if row.action.any() else len(row.token)


def lay_out(
    rows: Sequence[Row], *, group: int, prompt_bucket: int, bucket: int, most: int | None = None
) -> tuple[Sequence[Row | None], Layout]:
    """Put rows in an order in which a model call may share what they begin with, and say what that is.

    Where no episode was cut the order stays, and each `group` consecutive rows share their prompt, if they have the
    same one. Where episodes have several rows, those of a prompt follow each other in groups of `group`, the last one
    filled up with empty rows (None), and share what all of a group begin with: as long as fewer positions are read so.
    """
    if all(row.segment == 0 for row in rows):
        return rows, layout_of(rows, group=group, prompt_bucket=prompt_bucket, most=most)
    laid: list[Row | None] = []
    for _, found in groupby(rows, key=lambda row: row.group):
        laid += found
        laid += [None] * (-len(laid) % group)
    prefix = _prefixes(laid, group)
    layout = Layout(group, bucketed(max(prefix), prompt_bucket, most))
    shared = layout.prefix / group + bucketed(_rest(laid, prefix), bucket, most)
    alone = bucketed(_rest(rows, [0] * len(rows)), bucket, most)
    return (laid, layout) if group > 1 and len(laid) * shared < len(rows) * alone else (rows, Layout())


def bucketed(count: int, unit: int, most: int | None = None, steps: int = 4) -> int:
    """Round up to a multiple of `unit`: to few of them, for each is another program to compile.

    Up to `2 steps` times the unit to any multiple, beyond to `steps` sizes between a power of two and the next: a row
    is padded by less than 1/steps, and there are about `steps log2(most / unit)` sizes. What no count is over, `most`,
    bounds them, itself rounded up to a multiple.
    """
    parts, grain = -(-count // unit), 1
    while parts > 2 * steps * grain:
        grain *= 2
    size = -(-parts // grain) * grain
    return unit * (size if most is None else min(size, -(-most // unit)))


def layout_of(rows: Sequence[Row], *, group: int, prompt_bucket: int, most: int | None = None) -> Layout:
    """Find out what a model call may share: the prompt, where each `group` consecutive rows start with the same one."""
    whole = len(rows) % group == 0
    prefix = [_prefix(row) for row in rows]
    for first in range(0, len(rows) if whole else 0, group):
        n = prefix[first]
        members = range(first, first + group)
        whole &= all(prefix[i] == n and np.array_equal(rows[i].token[:n], rows[first].token[:n]) for i in members)
    if group == 1 or not whole:
        return Layout()
    return Layout(group, bucketed(max(prefix), prompt_bucket, most))


def _prefixes(rows: Sequence[Row | None], group: int) -> list[int]:
    """Of each row the tokens before its first action which all rows of its group begin with."""
    out: list[int] = []
    for first in range(0, len(rows), group):
        members = [row for row in rows[first : first + group] if row is not None]
        n = min(map(_prefix, members), default=0)
        for row in members[1:]:
            differ = np.flatnonzero(row.token[:n] != members[0].token[:n])
            n = int(differ[0]) if len(differ) else n
        out += [n] * min(group, len(rows) - first)
    return out


def _rest(rows: Sequence[Row | None], prefix: Sequence[int]) -> int:
    """Positions that the longest row needs behind its prefix, one for the state after its last token among them."""
    return max(len(row.token) - n for row, n in zip(rows, prefix, strict=True) if row is not None) + 1


def pack(
    rows: Sequence[Row | None],
    *,
    batch: int,
    bucket: int,
    actions: int,
    mesh: jax.sharding.Mesh,
    layout: Layout = PLAIN,
    most: int | None = None,
) -> Experience:
    """Pad rows on the right to one length, add empty rows up to a batch, and split them over the mesh.

    Args:
        rows: at most `batch` of them; None stays empty.
        batch: rows of the result.
        bucket: what follows a shared prefix (or the whole row, where nothing is shared) is padded to a multiple of
            this (see `bucketed`), with room for one more token than the longest row has.
        actions: action positions kept of each row, at least those of the fullest one.
        mesh: where the arrays go.
        layout: what the rows share.
        most: tokens of a row, at most.
    """
    prefix = _prefixes(rows, layout.group)
    T = layout.prefix + bucketed(_rest(rows, prefix if layout.group > 1 else [0] * len(rows)), bucket, most)
    shape = (batch, T)
    token_BT, action_BT = np.zeros(shape, np.int32), np.zeros(shape, bool)
    logp_BT, reward_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    index_BA = np.zeros((batch, min(actions, T)), np.int32)
    for b, row in enumerate(rows):
        if row is None:
            continue
        n = len(row.token)
        counts = row.ending != Ending.ERROR
        token_BT[b, :n] = row.token
        action_BT[b, :n] = row.action & counts
        logp_BT[b, :n] = row.logp_behavior
        reward_BT[b, :n] = row.reward
        where = np.flatnonzero(row.action & counts)
        index_BA[b, : len(where)] = where

    def ids(of: Callable[[Row], int], fill: int) -> np.ndarray:
        return np.array([*(fill if row is None else of(row) for row in rows), *[fill] * (batch - len(rows))], np.int32)

    arrays = {
        "token_BT": token_BT,
        "length_B": ids(lambda row: len(row.token), 0),
        "prefix_B": np.array([*prefix, *[0] * (batch - len(rows))], np.int32),
        "action_BT": action_BT,
        "action_index_BA": index_BA,
        "logp_behavior_BT": np.where(action_BT, logp_BT, np.float32(0)),
        "reward_BT": reward_BT,
        "ending_B": ids(lambda row: row.ending, Ending.ERROR),
        "valid_B": ids(lambda row: row.ending != Ending.ERROR, 0).astype(bool),
        "group_B": ids(lambda row: row.group, batch - 1),
        "episode_B": ids(lambda row: row.episode, -1),
        "segment_B": ids(lambda row: row.segment, 0),
        "recorded": _recorded(rows, index_BA.shape),
    }
    return Experience(**shard_rows({**arrays, **_routed(rows, shape), **_hints(rows, batch, bucket)}, mesh))


def _hints(rows: Sequence[Row | None], batch: int, bucket: int) -> dict[str, np.ndarray]:
    """What only the critics read, padded to a multiple of the bucket; nothing where no row has a hint."""
    hints = [np.zeros(0, np.int32) if row is None or row.hint is None else row.hint for row in rows]
    longest = max(map(len, hints))
    if longest == 0:
        return {}
    hint_BH, length_B = np.zeros((batch, bucketed(longest, bucket)), np.int32), np.zeros(batch, np.int32)
    for b, hint in enumerate(hints):
        hint_BH[b, : len(hint)], length_B[b] = hint, len(hint)
    return {"hint_BH": hint_BH, "hint_length_B": length_B}


def _routed(rows: Sequence[Row | None], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """The recorded experts of every token, -1 where there is no record; nothing where no row has one."""
    kept = [(b, row.routed) for b, row in enumerate(rows) if row is not None and row.routed is not None]
    if not kept:
        return {}
    routed_BTLK = np.full((*shape, *kept[0][1].shape[1:]), -1, np.int16)
    for b, routed in kept:
        routed_BTLK[b, : len(routed)] = routed
    return {"routed_BTLK": routed_BTLK}


def _recorded(rows: Sequence[Row | None], shape: tuple[int, ...]) -> Recorded:
    """What the sampler kept of each action, 0 behind a row's last one and in rows that failed; None where nothing."""
    full = [(b, row) for b, row in enumerate(rows) if row is not None]

    def one(column: tuple[np.ndarray | None, ...]) -> np.ndarray | None:
        first = column[0]
        if first is None:
            return None
        out = np.zeros((*shape, *first.shape[1:]), first.dtype)
        for (b, row), kept in zip(full, column, strict=True):
            if kept is not None and row.ending != Ending.ERROR:
                out[b, : len(kept)] = kept
        return out

    return Recorded(*map(one, zip(*(row.recorded for _, row in full), strict=True)))
