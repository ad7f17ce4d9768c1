"""Run directories as trainings leave them, for the report: numbers by hand, nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ppojax.runtime.metrics import MetricsLog
from ppojax.runtime.rundir import RunDir
from ppojax.types import Ending
from viewer_run import row, write_step

CONFIG = {
    "seed": 0,
    "steps": 4,
    "run": {"name": "x", "dir": "runs"},
    "env": {"type": "calculator", "high": 9},
    "critic": {"model": {"type": "cut", "layers": 2}},
    "advantage": {"type": "gae", "gamma": 0.5},
    "loss": {"type": "dppo", "delta": 0.2},
}


def config(**changes: Any) -> dict[str, Any]:
    """The settings with other values: `loss={...}`."""
    return {**CONFIG, **changes}


def write_run(
    folder: Path,
    rewards: Sequence[float | None],
    *,
    settings: Mapping[str, Any] = CONFIG,
    code: int | None = 0,
    reason: str = "done",
    rows: Mapping[int, Mapping[str, float]] | None = None,
    success: Mapping[int, float] | None = None,
) -> Path:
    """Write a run of these rewards from step 1 on. A step takes 2 s and 100 tokens; the first compiled for 5 s.

    `rows` adds to the metrics of a step; `success` adds evaluations; without a `code` there is no `exit.json`.
    """
    run = RunDir(folder)
    folder.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump({**settings, "run": {"name": folder.name}}))
    with MetricsLog(run.metrics) as log:
        for step in range(len(rewards) + 1):
            evaluated = {} if success is None or step not in success else _evaluation(success[step])
            if step == 0:
                if evaluated:
                    log.log(0, evaluated)
                continue
            reward = rewards[step - 1]
            log.log(
                step,
                {
                    "reward/mean": np.nan if reward is None else reward,
                    "perf/total_num_tokens": 100.0,
                    "timing_s/step": 2.0,
                    "timing_s/gen": 1.0,
                    "timing_s/env_wait": 0.25,
                    "timing_s/update_actor": 0.5,
                    "compile/count": 5.0,
                    "compile/seconds": 5.0,
                    **(rows or {}).get(step, {}),
                    **evaluated,
                },
            )
    if code is not None:
        run.write_exit(code, reason, len(rewards), None, "")
    return folder


def _evaluation(success: float) -> dict[str, float]:
    return {"val/success": success, "val/success_low": success - 0.1, "val/success_high": success + 0.1}


def write_values(folder: Path, step: int, *, critics: int = 1) -> None:
    """Write a transcript: one episode of two rows (cut), one that failed, one that ended at once.

    With gamma 1/2 the first episode's actions have the returns 1/4, 1/2, 1 (two in its first row, one in its
    second), the last one's 0; the values are 0, .5, 1 and .5, plus .1 for each further critic.
    """
    pieces = [["Q", "a", "b"], ["S", "c"], ["Q", "x"], ["Q", "d"]]
    rows = [
        row(pieces[0], "011", episode=0, ending=Ending.CUT),
        row(pieces[1], "01", episode=0, segment=1, reward=1.0, token=np.array([8, 9], np.int32)),
        row(pieces[2], "01", episode=1, ending=Ending.ERROR, reward=7.0),
        row(pieces[3], "01", episode=2),
    ]
    value_BT = np.array([[9, 0, 0.5], [9, 1, 9], [9, 9, 9], [9, 0.5, 9]], np.float32)
    advantage_BT = np.tile(np.array([0, 0.5, -0.5], np.float32), (4, 1))
    arrays = {}
    if critics:
        arrays["value_MBT"] = np.stack([value_BT + np.float32(0.1) * m for m in range(critics)])
    write_step(folder, step, rows, pieces, advantage_BT=advantage_BT, **arrays)


def spoil(path: Path, line: int, text: str) -> None:
    """Put something else into a line of a file; the first is 0."""
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines) + "\n")
