"""Runs of two processes on this machine, over gloo, against runs of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

from ppojax.runtime.metrics import read_metrics
from processes.test_meeting import free_port
from tiny_config import tiny_run

REPO = Path(__file__).resolve().parents[2]
# What the machine was busy with, and what was compiled, is each run's own.
CLOCKS = ("time", "timing_s/", "perf/", "compile/", "ckpt/")
SETTINGS = ("steps=4", "checkpoint.every=2", "eval.every=4", "eval.prompts=5")
APART = ("update.shared_prefix=false",)  # a minibatch of two groups of two has a row for each of four devices
BEATS = "processes.heartbeat_s=5"
Row = Mapping[str, float | int | None]


def start(arguments: list[str], index: int | None = None, port: int = 0, devices: int = 1) -> subprocess.Popen[str]:
    """A process of a run of two; without an index one that is alone."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": flags}
    if index is not None:
        env |= {"PPOJAX_COORDINATOR": f"127.0.0.1:{port}"}
        env |= {"PPOJAX_PROCESS_COUNT": "2", "PPOJAX_PROCESS_INDEX": str(index)}
    command = [sys.executable, "-m", "ppojax.train", *arguments]
    return subprocess.Popen(command, cwd=REPO, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def two(arguments: list[str], devices: int = 1) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [start(arguments, index, port, devices) for index in range(2)]


def ends(processes: list[subprocess.Popen[str]], within_s: float = 240) -> tuple[list[int], list[str]]:
    """Exit codes and what was said; whoever does not end in time is killed, with code -9."""
    try:
        said = [process.communicate(timeout=within_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def rows(folder: Path, name: str) -> list[Row]:
    path = folder / name / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def wait_for(folder: Path, name: str, steps: int) -> None:
    give_up = time.monotonic() + 240
    while len(rows(folder, name)) < steps:
        assert time.monotonic() < give_up, "no steps"
        time.sleep(0.1)


def same(one: list[Row], other: list[Row], bound: float) -> None:
    """All that two runs logged, but for times, within a relative bound; counts of rewards to the bit."""
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for row, twin in zip(one, other, strict=True):
        names = {name for name in row if not name.startswith(CLOCKS)}
        assert names == {name for name in twin if not name.startswith(CLOCKS)}
        for name in names:
            exact = name.startswith(("reward/", "response_length/", "prompt_length/", "error/"))
            assert row[name] == pytest.approx(twin[name], rel=0 if exact else bound, abs=0 if exact else bound), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Row]]:
    """What one process with two devices logs."""

    @cache
    def run(*more: str) -> list[Row]:
        folder = tmp_path_factory.mktemp("alone")
        codes, said = ends([start(tiny_run(folder, *SETTINGS, *more, "mesh.data=2", "run.name=a"), devices=2)])
        assert codes == [0], said
        return rows(folder, "a")

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "devices", "more"),
    [
        ("mesh.data=2", 1, ()),
        ("mesh.fsdp=2", 1, ()),
        ("mesh.fsdp=4", 2, APART),
        ("mesh={data: 2, fsdp: 2}", 2, APART),
    ],
)
def test_two_processes_learn_as_one(
    mesh: str, devices: int, more: tuple[str, ...], alone: Callable[..., list[Row]], tmp_path: Path
) -> None:
    """Bound: 1e-4, of float32 sums in another order, over four steps; also with weights spread over processes."""
    codes, said = ends(two(tiny_run(tmp_path, *SETTINGS, *more, mesh, "run.name=a"), devices))
    assert codes == [0, 0], said
    same(alone(*more), rows(tmp_path, "a"), 1e-4)
    text = (tmp_path / "a/rollouts/step_000004.jsonl").read_text()
    assert [json.loads(line)["episode"] for line in text.splitlines()] == list(range(8))
    assert "count: null" in (tmp_path / "a/config.yaml").read_text()


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(alone: Callable[..., list[Row]], tmp_path: Path) -> None:
    arguments = tiny_run(tmp_path, *SETTINGS, "checkpoint.every=1", "run.name=a")
    killed = two([*arguments, "mesh.data=2", "steps=400"])
    wait_for(tmp_path, "a", 2)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    assert ends(killed)[0] == [-signal.SIGKILL] * 2
    for later in (tmp_path / "a/checkpoints").glob("*"):
        if not later.name.isdecimal() or int(later.name) > 3:
            shutil.rmtree(later)
    codes, said = ends([start([*arguments, "mesh.data=1", "resume=true"])])
    assert codes == [0], said
    same(alone(), rows(tmp_path, "a"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run(lost: int, tmp_path: Path) -> None:
    """Where process 0 is lost, jax's own runtime may end the other first, with SIGABRT."""
    processes = two(tiny_run(tmp_path, "mesh.data=2", "steps=400", "warm_start=null", "run.name=a"))
    wait_for(tmp_path, "a", 1)
    processes[lost].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    codes, said = ends(processes, 30)
    assert codes[lost] == -signal.SIGKILL and time.monotonic() - begin < 20
    assert codes[1 - lost] == 70 or (lost == 0 and codes[1] == -signal.SIGABRT), said
    if lost == 1:
        assert "ppojax: error: process 1 is gone" in said[0]
        assert json.loads((tmp_path / "a" / "exit.json").read_text())["code"] == 70


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_run(stopped: int, tmp_path: Path) -> None:
    """It lives, and gives no sign of life; when it goes on, it finds that it is alone."""
    processes = two(tiny_run(tmp_path, "mesh.data=2", "steps=400", "warm_start=null", "run.name=a", BEATS))
    wait_for(tmp_path, "a", 1)
    processes[stopped].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    other = processes[1 - stopped]
    _, said = other.communicate(timeout=60)
    assert other.returncode == 70 and time.monotonic() - begin < 20, said
    assert f"ppojax: error: process {stopped} is gone, or has given no sign of life for 5 s" in said
    processes[stopped].send_signal(signal.SIGCONT)
    codes, said = ends([processes[stopped]], 60)
    assert codes == [70] or codes == [-signal.SIGABRT], said


@pytest.mark.slow
def test_a_signal_to_one_stops_and_saves_all(tmp_path: Path) -> None:
    processes = two(tiny_run(tmp_path, "mesh.data=2", "steps=400", "warm_start=null", "run.name=a"))
    wait_for(tmp_path, "a", 1)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ends(processes, 60)
    assert codes == [75, 75], said
    left = json.loads((tmp_path / "a" / "exit.json").read_text())
    assert (left["code"], left["last_checkpoint"]) == (75, left["step"])


@pytest.mark.slow
def test_a_mesh_that_leaves_devices_out(tmp_path: Path) -> None:
    codes, said = ends(two(tiny_run(tmp_path, "mesh.data=1", "run.name=a")))
    assert codes == [2, 2]
    assert "has 1 devices, 2 processes have 2, and none may be left out: make the product of" in said[0]
