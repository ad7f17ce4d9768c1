"""A run directory as a training leaves it, for the viewer: rows by hand, written by `write_transcripts`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ppojax.runtime.metrics import MetricsLog
from ppojax.runtime.rundir import RunDir
from ppojax.runtime.transcripts import write_transcripts
from ppojax.types import Ending, Row

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "[red]x[/red][link=http://a]",
    "\u202egnp.exe",
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"\' onmouseover=alert(3) x="',
    "</style><img src=x onerror=alert(4)>",
    "javascript:alert(5)",
    "<!--",
    "\x00\x9b31m\ud800\u2028",
]


def row(pieces: Sequence[str], actions: str, *, episode: int = 0, segment: int = 0, **kwargs) -> Row:
    """A row of these pieces, one id each; `actions` has a 1 where the policy wrote. The last token is rewarded."""
    n = len(pieces)
    action = np.array([c == "1" for c in actions])
    assert len(action) == n
    fields = {
        "token": np.arange(n, dtype=np.int32) + 100 * (1 + episode),
        "action": action,
        "logp_behavior": np.where(action, np.float32(-0.5), np.float32(0)),
        "reward": np.zeros(n, np.float32),
        "group": episode // 2,
        "episode": episode,
        "segment": segment,
        "ending": Ending.TERMINATED,
        "messages": [{"role": "user", "content": "".join(HOSTILE)}],
    }
    reward = kwargs.pop("reward", 0.0)
    fields["reward"][-1] = reward
    return Row(**{**fields, **kwargs})


def write_step(run: Path, step: int, rows: Sequence[Row], pieces: Sequence[Sequence[str]], **arrays) -> Path:
    """Write the transcript of a step; `pieces` are the texts of the rows' tokens. Arrays as in `write_transcripts`."""
    words = {
        int(t): text for r, texts in zip(rows, pieces, strict=True) for t, text in zip(r.token, texts, strict=True)
    }
    path = RunDir(run).transcript(step)
    write_transcripts(path, rows, lambda ids: "".join(words[i] for i in ids), **arrays)
    return path


def write_metrics(run: Path, rewards: dict[int, float]) -> None:
    """Write `metrics.jsonl` with the mean reward of each step."""
    with MetricsLog(RunDir(run).metrics) as log:
        for step, reward in rewards.items():
            log.log(step, {"reward/mean": reward})


def small_run(run: Path, *, critics: int = 1, ratio: bool = True) -> Path:
    """Three steps. In each: episode 0 with two turns, 1 failed, 2 compacted into two rows, 3 truncated."""
    run.mkdir(parents=True)
    pieces = [
        ["Q", "a", "b\n", "OBS", "c", "d"],
        ["Q", "x", "y"],
        ["Q", "s", "sum"],
        ["sum", "end", "."],
        ["R", "t"],
    ]
    for step in (1, 2, 12):
        rows = [
            row(pieces[0], "011011", episode=0, reward=1.0),
            row(pieces[1], "011", episode=1, ending=Ending.ERROR, info={"error": "TimeoutError"}),
            row(pieces[2], "011", episode=2, ending=Ending.CUT),
            row(pieces[3], "011", episode=2, segment=1, reward=-0.5, token=np.arange(3, dtype=np.int32) + 350),
            row(pieces[4], "01", episode=3, ending=Ending.TRUNCATED),
        ]
        advantage_BT = np.zeros((5, 8), np.float32)
        advantage_BT[0, :6] = [9, 1, -1, 9, 0.5, 0]  # off action it is not looked at
        advantage_BT[2, 1:3] = [0.25, -0.25]
        arrays = {}
        if critics:
            value_BT = np.tile(np.linspace(0, 0.7, 8, dtype=np.float32), (5, 1))
            arrays["value_MBT"] = np.stack([value_BT + 0.1 * m for m in range(critics)])
        if ratio:
            arrays["ratio_BT"] = np.tile(np.exp2(np.linspace(-1, 1, 8, dtype=np.float32)), (5, 1))
        mask_BT = np.ones((5, 8), bool)
        mask_BT[2, 2] = False
        write_step(run, step, rows, pieces, advantage_BT=advantage_BT, mask_BT=mask_BT, **arrays)
    write_metrics(run, {1: 0.125, 2: 0.25, 12: 0.5})
    return run
