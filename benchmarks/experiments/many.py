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
    "reward/success",
    "val/success",
    "actor/entropy",
    "actor/ppo_kl",
    "actor/grad_norm",
    "trust_region/masked_frac",
    "trust_region/tv_mean",
    "trust_region/tv_max",
    "trust_region/kl_mean",
    "sampling/logp_diff_mean",
    "sampling/logp_diff_max",
    "critic/vf_explained_var",
    "critic/value_std",
    "response_length/mean",
    "compaction/segments_mean",
    "perf/total_num_tokens",
    "timing_s/step",
    "timing_s/gen",
    "timing_s/update_critic",
    "timing_s/update_actor",
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
    """Do the runs that `folder` has not yet, and read all of them; each worker has a core of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    workers = min(workers, len(cores))
    free = list(cores[:workers])
    start, done = time.monotonic(), 0

    def one(run: Run) -> dict[str, Any]:
        nonlocal done
        core = free.pop()
        try:
            code = _train(run, folder, core)
        finally:
            free.append(core)
        done += 1
        left = (time.monotonic() - start) / done * (len(runs) - done)
        print(f"{done}/{len(runs)} {run.name} exit {code}, {left / 60:.0f} min left", flush=True)
        return _read(run, folder, code)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, runs))


def _train(run: Run, folder: Path, core: int) -> int:
    out = folder / run.name
    if (out / "exit.json").is_file():
        return json.loads((out / "exit.json").read_text())["code"]
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "ppojax.train", *run.arguments, f"seed={run.seed}"]
    command += [f"run.dir={folder}", f"run.name={run.name}", "run.tensorboard=false", "checkpoint.every=0"]
    command += [f"run.compilation_cache={folder / 'compiled'}"]
    with (folder / f"{run.name}.log").open("w") as log:
        done = subprocess.run(["taskset", "-c", str(core), *command], stdout=log, stderr=subprocess.STDOUT, check=False)
    return done.returncode


def _read(run: Run, folder: Path, code: int) -> dict[str, Any]:
    """A run's metrics, step by step; a run that ended early has fewer."""
    rows = []
    path = folder / run.name / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        row = json.loads(line)
        rows.append({"step": row["step"], **{name: _short(row[name]) for name in KEPT if name in row}})
    return {"method": run.method, "setting": run.setting, "seed": run.seed, "exit": code, "rows": rows}


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.5g}")


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
