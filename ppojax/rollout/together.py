"""The tasks of a call dealt out among the processes of a run, and their rows handed round."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load, save

from ppojax.envs import Task
from ppojax.processes.exchange import gather
from ppojax.types import Ending, Recorded, Rollout, Row

ADDED = ("error/", "data/")  # metrics that are counts
PLAIN = ("token", "action", "logp_behavior", "reward")  # arrays of a row, one number a token
RARE = ("hint", "routed", "recorded")  # arrays that not every row has
OTHERS = tuple(field.name for field in fields(Row) if field.name not in (*PLAIN, *RARE))


def together(play: Callable[[Sequence[Task], int], Rollout], tasks: Sequence[Task]) -> Rollout:
    """Play this process's share of the tasks, and return the rows of all, in the order of the tasks.

    Shares are consecutive tasks, as equal as can be. `play` gets its tasks and the number of the first one, so that
    groups, episodes and their randomness have the numbers that they have in one process. Rows go round with all that
    is recorded of them; counts of the processes add up, of seconds the longest is taken, other metrics are averaged.
    """
    index, count = jax.process_index(), jax.process_count()
    first, last = index * len(tasks) // count, (index + 1) * len(tasks) // count
    mine = play(tasks[first:last], first)
    parts = [decode(part) for part in gather(encode(mine))]
    return Rollout(tuple(row for part in parts for row in part.rows), _metrics([part.metrics for part in parts]))


def encode(rollout: Rollout) -> bytes:
    """Write rows and metrics as bytes: arrays as safetensors, the rest as JSON in one of them."""
    rows = rollout.rows
    arrays = {name: _joined(vars(row)[name] for row in rows) for name in PLAIN}
    for i, row in enumerate(rows):
        kept = {"hint": row.hint, "routed": row.routed, **row.recorded._asdict()}
        arrays |= dict(_named(f"{name}/{i}", array) for name, array in kept.items() if array is not None)
    head = {"metrics": rollout.metrics, "rows": [_head(row) for row in rows]}
    arrays["head"] = np.frombuffer(json.dumps(head, default=_number).encode(), np.uint8)
    return save(arrays)


def decode(data: bytes) -> Rollout:
    """Undo `encode`."""
    arrays = {}
    for key, array in load(data).items():
        name, _, kind = key.partition(":")
        arrays[name] = array.view(jax.numpy.dtype(kind)) if kind else array
    head = json.loads(arrays["head"].tobytes())
    cuts = np.cumsum([said["length"] for said in head["rows"]])[:-1]
    columns = {name: np.split(arrays[name], cuts) for name in PLAIN}
    rows = []
    for i, said in enumerate(head["rows"]):
        values: dict[str, Any] = {name: said[name] for name in OTHERS} | {name: columns[name][i] for name in PLAIN}
        values["ending"] = Ending(said["ending"])
        values["recorded"] = Recorded(*(arrays.get(f"{name}/{i}") for name in Recorded._fields))
        rows.append(Row(**values, hint=arrays.get(f"hint/{i}"), routed=arrays.get(f"routed/{i}")))
    return Rollout(tuple(rows), head["metrics"])


def _head(row: Row) -> dict[str, Any]:
    return {"length": len(row.token), **{name: vars(row)[name] for name in OTHERS}}


def _named(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Types that numpy does not know, such as bfloat16, go as whole numbers, and are said in the name."""
    if array.dtype.kind in "biuf":
        return name, array
    return f"{name}:{array.dtype.name}", array.view(f"u{array.dtype.itemsize}")


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    whole = list(parts)
    return np.concatenate(whole) if whole else np.zeros(0, np.float32)


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def _metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    out = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if name.startswith("timing_s/"):
            out[name] = max(values)
        else:
            out[name] = sum(values) / (1 if name.startswith(ADDED) else len(values))
    return out
