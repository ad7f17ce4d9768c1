"""Training steps on episodes of several rows."""

from __future__ import annotations

import numpy as np
import pytest

from ppojax.config import Config
from ppojax.errors import ConfigError
from ppojax.trainer import Trainer
from ppojax.types import Ending
from tiny_config import TINY

LONG = (
    *(argument for argument in TINY if not argument.startswith("env.")),
    "env.type=warehouse",
    "env.turns=8",
    "env.kinds=6",
    "env.ordered=3",
    "env.system=''",
    "rollout.max_turn_tokens=6",
    "rollout.max_tokens=64",
    "rollout.compaction.type=truncate",
    "rollout.compaction.keep_turns=1",
    "rollout.compaction.limit=40",
    "rollout.compaction.most=8",
    "warm_start.steps=40",
)


def test_steps_on_chains() -> None:
    """Rows are more than episodes, every one is scored and trained, and nothing compiles after the first steps."""
    trainer = Trainer(Config.load(*LONG))
    trainer.warm_start()
    outs = [trainer.step() for _ in range(4)]
    for out in outs:
        assert all(np.isfinite(value) for value in out.metrics.values())
        assert out.metrics["sampling/logp_diff_max"] < 1e-4
        rows = out.rollout.rows
        assert len(rows) > 8 and {row.episode for row in rows} == set(range(8))
        e = out.batch.experience
        assert e.token_BT.shape[0] % 8 == 0 and int(np.asarray(e.valid_B).sum()) == len(rows)
        placed = [row for row in out.rows if row is not None]
        assert all(a is b for a, b in zip(placed, rows, strict=True))
        trained = np.asarray(e.action_BT).sum()
        assert trained == sum(row.action.sum() for row in rows)
        assert any(row.ending == Ending.CUT for row in rows)
        assert out.metrics["compaction/segments_mean"] == len(rows) / 8
    counts = [out.metrics["compile/count"] for out in outs]
    assert counts[-1] == counts[-2], counts


def test_room_for_a_summary_is_looked_at_before_the_first_step() -> None:
    plain = [argument for argument in LONG if "compaction" not in argument]
    summary = ("type=summary", "max_tokens=60", "request=go", "header=' '")
    arguments = [*plain, *(f"rollout.compaction.{setting}" for setting in summary)]
    with pytest.raises(ConfigError, match=r"rollout\.compaction: of the 63 positions of a row a summary"):
        Trainer(Config.load(*arguments))
