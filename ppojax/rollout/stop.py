"""Stop strings as a table over tokens, so that a jitted loop can watch for them.

A string may begin and end anywhere inside a token. An Aho-Corasick automaton over bytes (Aho & Corasick 1975) is
lifted to whole tokens: one lookup a step follows every stop string at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

START = 0


def stop_table(token_bytes: Sequence[bytes], stop: Sequence[str], stop_ids: Sequence[int]) -> np.ndarray:
    """Build `next[state, token]`, int32 `[states, V]`; the last state means "stopped" and is never left.

    Args:
        token_bytes: the bytes of each token id; empty for special tokens, which break a string in progress.
        stop: strings that end a turn once they have been written.
        stop_ids: tokens that end a turn by themselves.
    """
    by_byte = _byte_automaton([s.encode() for s in stop])
    stopped = by_byte.shape[0] - 1
    longest = max(map(len, token_bytes), default=0)
    length_V = np.array([len(b) for b in token_bytes])
    padded = b"".join(b.ljust(longest, b"\0") for b in token_bytes)
    byte_VN = np.frombuffer(padded, np.uint8).reshape(len(token_bytes), longest)
    table = np.repeat(np.arange(stopped + 1, dtype=np.int32)[:, None], len(token_bytes), axis=1)
    for n in range(longest):
        table = np.where(n < length_V[None, :], by_byte[table, byte_VN[None, :, n]], table)
    table[:stopped, length_V == 0] = START
    table[:, list(stop_ids)] = stopped
    return table


def _byte_automaton(patterns: Sequence[bytes]) -> np.ndarray:
    """`next[state, byte]` over the prefixes of the patterns, with every match sent to one last, absorbing state."""
    prefixes = sorted({p[:n] for p in patterns for n in range(len(p))} | {b""}, key=len)
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    stopped = len(prefixes)
    table = np.full((stopped + 1, 256), stopped, np.int32)
    for prefix, state in index.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if any(p in text for p in patterns):
                continue
            suffix = next(text[n:] for n in range(len(text) + 1) if text[n:] in index)
            table[state, byte] = index[suffix]
    return table
