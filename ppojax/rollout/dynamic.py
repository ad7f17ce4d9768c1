"""Dynamic sampling: prompts whose episodes all earn the same teach a group baseline nothing, so others are played."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ppojax.types import Ending, Rollout, Row, episodes_of


def choose(parts: Sequence[Rollout], prompts: int) -> Rollout:
    """Keep `prompts` groups: those whose episodes earned different rewards, then, where these are too few, others.

    Groups and episodes are numbered anew. Counts and seconds of the parts add up, other metrics are averaged;
    `dynamic/kept_frac` is the share of varied groups in all that were played, `dynamic/rounds` how often was played.
    """
    groups = [group for part in parts for group in _groups(part.rows)]
    differing = [group for group in groups if varied(group)]
    same = [group for group in groups if not varied(group)]
    rows: list[Row] = []
    episodes = 0
    for number, group in enumerate([*differing, *same][:prompts]):
        found = episodes_of(group)
        for episode, segments in enumerate(found, start=episodes):
            rows += [replace(row, group=number, episode=episode) for row in segments]
        episodes += len(found)
    metrics = _together([part.metrics for part in parts])
    metrics |= {"dynamic/rounds": float(len(parts)), "dynamic/kept_frac": len(differing) / len(groups)}
    return Rollout(tuple(rows), metrics)


def count_varied(parts: Iterable[Rollout]) -> int:
    """Groups whose episodes earned different rewards."""
    return sum(varied(group) for part in parts for group in _groups(part.rows))


def varied(group: Sequence[Row]) -> bool:
    """Whether the episodes of a group that count earned different rewards."""
    earned = [
        sum(float(row.reward.sum()) for row in segments)
        for segments in episodes_of(group)
        if segments[-1].ending != Ending.ERROR
    ]
    return bool(earned) and max(earned) - min(earned) > 1e-6


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return list(found.values())


def _together(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for part in parts for name in part})
    out = {}
    for name in names:
        values = [part[name] for part in parts if name in part]
        out[name] = sum(values) if name.startswith(("error/", "data/", "timing_s/")) else sum(values) / len(values)
    return out
