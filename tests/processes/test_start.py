"""Processes that cannot start together say so, before jax is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ppojax.cli import run_command
from ppojax.errors import ConfigError
from ppojax.rollout.settings import RolloutConfig
from ppojax.train import main
from processes.test_meeting import free_port
from tiny_config import tiny_run

REPO = Path(__file__).resolve().parents[2]


def test_one_line_in_each_process(tmp_path: Path) -> None:
    env = {**os.environ, "PPOJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "PPOJAX_PROCESS_COUNT": "2"}
    runs = []
    for index, seed in enumerate((0, 3)):
        command = [sys.executable, "-m", "ppojax.train", *tiny_run(tmp_path, f"seed={seed}")]
        mine = {**env, "PPOJAX_PROCESS_INDEX": str(index)}
        runs.append(subprocess.Popen(command, cwd=REPO, env=mine, stderr=subprocess.PIPE, text=True))
    for run in runs:
        line = (
            "process 1 has another config than process 0: 'seed: 3', not 'seed: 0'; start all with the same arguments"
        )
        assert run.communicate(timeout=60)[1] == f"ppojax: error: {line}\n"
        assert run.returncode == 2
    assert not list(tmp_path.iterdir())


def test_an_index_beyond_the_count(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ppojax.train", *tiny_run(tmp_path)]
    env = {**os.environ, "PPOJAX_COORDINATOR": "a:1", "PPOJAX_PROCESS_COUNT": "2", "PPOJAX_PROCESS_INDEX": "2"}
    found = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr == (
        "ppojax: error: processes.index=2: there are 2 processes (ppojax); their numbers are 0 to 1\n"
    )


def test_what_many_processes_cannot_do_is_told_before_they_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("COORDINATOR", "127.0.0.1:1"), ("PROCESS_COUNT", "2"), ("PROCESS_INDEX", "1")):
        monkeypatch.setenv(f"PPOJAX_{name}", value)
    assert run_command(main, tiny_run(tmp_path, "rollout.devices=own", "rollout.mesh.data=1")) == 2
    assert capsys.readouterr().err == (
        "ppojax: error: rollout.devices=own: each process samples on the devices that it trains on: set "
        "rollout.devices=shared rollout.mesh=null, or use one process\n"
    )
    with pytest.raises(ConfigError) as caught:
        RolloutConfig(exact=True, mode="one_step_off").check_processes(2)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "rollout.exact=true",
        "rollout.mode=one_step_off",
    ]
    RolloutConfig(exact=True, mode="one_step_off").check_processes(1)
