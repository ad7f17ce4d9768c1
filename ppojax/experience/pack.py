"""From ragged rows on the host to arrays on the mesh."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from ppojax.mesh import shard_rows
from ppojax.types import Ending, Experience, Layout, Recorded, Row

PLAIN = Layout()


def _prefix(row: Row) -> int:
    """Tokens before the first action; a row that failed before it had one is all prompt."""
    return int(row.action.argmax()) if row.action.any() else len(row.token)


def layout_of(rows: Sequence[Row], *, group: int, prompt_bucket: int) -> Layout:
    """Find out what a model call may share: the prompt, where each `group` consecutive rows start with the same one."""
    whole = len(rows) % group == 0
    prefix = [_prefix(row) for row in rows]
    for first in range(0, len(rows) if whole else 0, group):
        n = prefix[first]
        members = range(first, first + group)
        whole &= all(prefix[i] == n and np.array_equal(rows[i].token[:n], rows[first].token[:n]) for i in members)
    if group == 1 or not whole:
        return Layout()
    return Layout(group, _round_up(max(prefix), prompt_bucket))


def pack(
    rows: Sequence[Row], *, batch: int, bucket: int, actions: int, mesh: jax.sharding.Mesh, layout: Layout = PLAIN
) -> Experience:
    """Pad rows on the right to one length, add empty rows up to a batch, and split them over the mesh.

    Args:
        rows: at most `batch` of them.
        batch: rows of the result.
        bucket: what follows a shared prefix (or the whole row, where nothing is shared) is padded to a multiple of
            this, with room for one more token than the longest row has.
        actions: action positions kept of each row, at least those of the fullest one.
        mesh: where the arrays go.
        layout: what the rows share.
    """
    prefix = [_prefix(row) for row in rows]
    if layout.group == 1:
        T = _round_up(max(len(row.token) for row in rows) + 1, bucket)
    else:
        rest = max(len(row.token) - n for row, n in zip(rows, prefix, strict=True)) + 1
        T = layout.prefix + _round_up(rest, bucket)
    shape = (batch, T)
    token_BT, action_BT = np.zeros(shape, np.int32), np.zeros(shape, bool)
    logp_BT, reward_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    index_BA = np.zeros((batch, min(actions, T)), np.int32)
    for b, row in enumerate(rows):
        n = len(row.token)
        counts = row.ending != Ending.ERROR
        token_BT[b, :n] = row.token
        action_BT[b, :n] = row.action & counts
        logp_BT[b, :n] = row.logp_behavior
        reward_BT[b, :n] = row.reward
        where = np.flatnonzero(row.action & counts)
        index_BA[b, : len(where)] = where

    def ids(values: Sequence[int], fill: int) -> np.ndarray:
        return np.array([*values, *[fill] * (batch - len(rows))], np.int32)

    arrays = {
        "token_BT": token_BT,
        "length_B": ids([len(row.token) for row in rows], 0),
        "prefix_B": ids(prefix, 0),
        "action_BT": action_BT,
        "action_index_BA": index_BA,
        "logp_behavior_BT": np.where(action_BT, logp_BT, np.float32(0)),
        "reward_BT": reward_BT,
        "ending_B": ids([row.ending for row in rows], Ending.ERROR),
        "valid_B": ids([row.ending != Ending.ERROR for row in rows], 0).astype(bool),
        "group_B": ids([row.group for row in rows], batch - 1),
        "episode_B": ids([row.episode for row in rows], -1),
        "segment_B": ids([row.segment for row in rows], 0),
        "recorded": _recorded(rows, index_BA.shape),
    }
    routed_BTLK = _routed(rows, shape)
    if routed_BTLK is not None:
        arrays["routed_BTLK"] = routed_BTLK
    return Experience(**shard_rows(arrays, mesh))


def _routed(rows: Sequence[Row], shape: tuple[int, int]) -> np.ndarray | None:
    """The recorded experts of every token, -1 where there is no record; None where no row has one."""
    kept = [(b, row.routed) for b, row in enumerate(rows) if row.routed is not None]
    if not kept:
        return None
    routed_BTLK = np.full((*shape, *kept[0][1].shape[1:]), -1, np.int16)
    for b, routed in kept:
        routed_BTLK[b, : len(routed)] = routed
    return routed_BTLK


def _recorded(rows: Sequence[Row], shape: tuple[int, ...]) -> Recorded:
    """What the sampler kept of each action, 0 behind a row's last one and in rows that failed; None where nothing."""

    def one(column: tuple[np.ndarray | None, ...]) -> np.ndarray | None:
        first = column[0]
        if first is None:
            return None
        out = np.zeros((*shape, *first.shape[1:]), first.dtype)
        for b, (row, kept) in enumerate(zip(rows, column, strict=True)):
            if kept is not None and row.ending != Ending.ERROR:
                out[b, : len(kept)] = kept
        return out

    return Recorded(*map(one, zip(*(row.recorded for row in rows), strict=True)))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
