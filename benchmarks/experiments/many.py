"""Many small runs, a few at a time, each a process of its own; what they wrote is kept as one table of rows."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

KEPT = (
    "reward/mean",
    "actor/entropy",
    "actor/ppo_kl",
    "actor/pg_clipfrac",
    "trust_region/masked_frac",
    "trust_region/tv_max",
    "sampling/logp_diff_mean",
    "critic/vf_explained_var",
    "compaction/segments_mean",
    "perf/total_num_tokens",
    "timing_s/step",
)


@dataclass(frozen=True)
class Run:
    """One run: what is compared, under which circumstances, and the seed."""

    method: str
    setting: str
    seed: int
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.method}.{self.setting}.{self.seed}"


def play(runs: Sequence[Run], folder: Path, workers: int) -> list[dict[str, Any]]:
    """Do the runs that `folder` has not yet, and read all of them.

    Runs of a method and setting, which differ in the seed, share a process, and so what was compiled; each worker has
    a core of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    workers = min(workers, len(cores))
    free = list(cores[:workers])
    todo = [run for run in runs if not (folder / run.name / "exit.json").is_file()]
    start, done = time.monotonic(), 0

    def share(bundle: Sequence[Run]) -> None:
        nonlocal done
        core = free.pop()
        try:
            _train(bundle, folder, core)
        finally:
            free.append(core)
        done += len(bundle)
        left = (time.monotonic() - start) / done * (len(todo) - done)
        print(f"{done}/{len(todo)} {bundle[0].method} {bundle[0].setting}, {left / 60:.0f} min left", flush=True)

    bundles: dict[tuple[str, str], list[Run]] = {}
    for run in todo:
        bundles.setdefault((run.method, run.setting), []).append(run)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(share, bundles.values()))
    return [_read(run, folder) for run in runs]


def _train(bundle: Sequence[Run], folder: Path, core: int) -> None:
    here = ["taskset", "-c", str(core)] if shutil.which("taskset") else []
    log = folder / f"{bundle[0].method}.{bundle[0].setting}.log"
    asked = [[run.name, *run.arguments, f"seed={run.seed}"] for run in bundle]
    command = [*here, sys.executable, __file__, str(folder)]
    with log.open("w") as file:
        subprocess.run(command, input=json.dumps(asked), text=True, stdout=file, stderr=subprocess.STDOUT, check=False)


def _one_after_another(folder: Path) -> None:
    """In a process of its own: the runs that stand in the input."""
    from ppojax.cli import run_command
    from ppojax.errors import ExitCode
    from ppojax.train import main

    for name, *arguments in json.load(sys.stdin):
        shutil.rmtree(folder / name, ignore_errors=True)
        where = [f"run.dir={folder}", f"run.name={name}", f"run.compilation_cache={folder / 'compiled'}"]
        code = run_command(main, [*arguments, *where, "run.tensorboard=false", "checkpoint.every=0"])
        print(f"{name}: exit {code}", flush=True)
        if code == ExitCode.PREEMPTED:
            (folder / name / "exit.json").unlink()  # it is to be played again
            break


def _read(run: Run, folder: Path) -> dict[str, Any]:
    """A run's metrics by step; a run that ended early has fewer, and one that never began no exit code."""
    ended, path = folder / run.name / "exit.json", folder / run.name / "metrics.jsonl"
    code = json.loads(ended.read_text())["code"] if ended.is_file() else None
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    columns = {name: [_short(row.get(name)) for row in rows] for name in KEPT if any(name in row for row in rows)}
    return {"method": run.method, "setting": run.setting, "seed": run.seed, "exit": code, "columns": columns}


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")


def write(path: Path, runs: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Keep the rows with the machine, the versions and the arguments they are of."""
    machine = {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))}
    versions = {"python": platform.python_version(), "jax": version("jax"), "jaxlib": version("jaxlib")}
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"machine": machine, "versions": versions, "date": date.today().isoformat(), **about}
    lines = [json.dumps(head), *(json.dumps(run) for run in runs)]
    path.write_text("\n".join(lines) + "\n")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    _one_after_another(Path(sys.argv[1]))
