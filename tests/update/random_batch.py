"""Random minibatches with everything that a loss may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np

from helpers import random_rows
from ppojax.experience.pack import layout_of, pack
from ppojax.mesh import AXES, MeshConfig, shard_rows
from ppojax.types import Batch, Ending, Layout, Row


def meshes_of(devices: int, tensor: int) -> dict[str, MeshConfig]:
    """Every mesh of so many devices, by its shape, with at most `tensor` of them along the axis of that name."""
    shapes = (shape for shape in product(range(1, devices + 1), repeat=4) if prod(shape) == devices)
    return {"x".join(map(str, s)): MeshConfig(**dict(zip(AXES, s, strict=True))) for s in shapes if s[-1] <= tensor}


def minibatch_rows(seed: int = 0) -> list[Row]:
    """Four groups of two; the last row failed, and behaviour log-probabilities are near those of a fresh policy."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in random_rows(4, 2, seed):
        logp = np.where(row.action, -np.log(48) + rng.normal(0, 0.3, len(row.token)), 0).astype(np.float32)
        rows.append(replace(row, logp_behavior=logp))
    rows[-1] = replace(rows[-1], ending=Ending.ERROR)
    return rows


def minibatch(
    mesh: MeshConfig | None = None,
    share: bool = False,
    rows: Sequence[Row] | None = None,
    batch: int = 8,
    bucket: int = 4,
) -> tuple[Batch, Layout]:
    """Pack rows with an advantage, a return, an old value and an old log-probability that follow from the episode."""
    rows = minibatch_rows() if rows is None else rows
    layout = layout_of(rows, group=2 if share else 1, prompt_bucket=4)
    built = (mesh or MeshConfig()).build()
    experience = pack(rows, batch=batch, bucket=bucket, actions=16, mesh=built, layout=layout)
    action_BT = np.asarray(experience.action_BT)
    advantage_BT, return_BT, value_BT, move_BT = (np.zeros(action_BT.shape, np.float32) for _ in range(4))
    for b, row in enumerate(rows):
        rng, where = np.random.default_rng(row.episode), np.flatnonzero(action_BT[b])
        for x, size in ((advantage_BT, 1.0), (return_BT, 1.0), (value_BT, 1.0), (move_BT, 0.2)):
            x[b, where] = rng.normal(0, size, len(where))
    old_BT = np.where(action_BT, np.asarray(experience.logp_behavior_BT) + move_BT, 0).astype(np.float32)
    advantage_BT, old_BT = shard_rows((advantage_BT, old_BT), built)
    return_MBT, value_MBT = shard_rows((return_BT[None], value_BT[None]), built, axis=1)
    scored = experience._replace(logp_old_BT=old_BT, logp_ref_BT=old_BT, value_MBT=value_MBT)
    score_B = shard_rows(np.asarray([b % 2 for b in range(len(action_BT))], np.float32), built)
    return Batch(scored, advantage_BT, return_MBT, score_B), layout
