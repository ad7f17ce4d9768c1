"""What a run leaves when it ends for another process's fault."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from ppojax.errors import PeerEnded
from ppojax.processes.meeting import Watch
from ppojax.processes.resolve import Place
from ppojax.runtime.rundir import RunDir
from ppojax.trainer.session import _exit_record


def test_the_exit_record_names_the_fault_that_came_first(tmp_path: Path) -> None:
    watch = Watch(Place("", 2, 0), {}, 20.0)
    told = Thread(target=watch._exit, args=(3, "process 1 ended with exit code 3: no such file", 20.0))
    with pytest.raises(PeerEnded, match="no such file") as caught, _exit_record(RunDir(tmp_path), watch) as ending:
        ending.update(trainer=SimpleNamespace(number=2), checkpoints=SimpleNamespace(latest=lambda: 1))
        told.start()
        raise RuntimeError("connection closed by peer")
    watch.end(caught.value.exit_code, str(caught.value))
    told.join()
    left = json.loads((tmp_path / "exit.json").read_text())
    assert (left["code"], left["step"], left["last_checkpoint"]) == (3, 2, 1) and left["reason"].endswith(
        "no such file"
    )
