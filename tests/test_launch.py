"""The launchers, as far as they can be tried without the systems that they are for."""

from __future__ import annotations

import os
import runpy
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from ppojax.processes.resolve import resolve
from ppojax.processes.settings import ProcessesConfig

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
NOTHING = ProcessesConfig()


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def bash(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run with the programs of `folder` before all others."""
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", *command], cwd=folder, env={**os.environ, "PATH": path, **env}, capture_output=True, text=True
    )


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_headers_say_what_was_run(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert "Was run: " in text and "Was not run: " in text


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_shell_scripts_parse(name: str, tmp_path: Path) -> None:
    found = bash(tmp_path, "-n", str(LAUNCH / name))
    assert (found.returncode, found.stderr) == (0, "")


def test_local_starts_n_processes_and_takes_the_first_fault(tmp_path: Path) -> None:
    said = (
        '"$PPOJAX_COORDINATOR $PPOJAX_PROCESS_COUNT $PPOJAX_PROCESS_INDEX $PPOJAX_LOCAL_INDEX $PPOJAX_LOCAL_COUNT $*"'
    )
    program(tmp_path, "py", f"echo {said} >>seen; (($PPOJAX_PROCESS_INDEX == 1)) && exit 70; exit 0")
    local = str(LAUNCH / "local.sh")
    found = bash(tmp_path, local, "3", "config=a.yaml", PYTHON="py", PPOJAX_PORT="4000")
    assert found.returncode == 70, found.stderr
    lines = sorted((tmp_path / "seen").read_text().splitlines())
    assert lines == [f"127.0.0.1:4000 3 {i} {i} 3 -m ppojax.train config=a.yaml" for i in range(3)]
    assert bash(tmp_path, local, "config=a.yaml").returncode == 2
    env = dict(
        zip(("PPOJAX_COORDINATOR", "PPOJAX_PROCESS_COUNT", "PPOJAX_PROCESS_INDEX"), lines[2].split(), strict=False)
    )
    assert resolve(NOTHING, env)[:3] == ("127.0.0.1:4000", 3, 2)


@pytest.mark.parametrize(("gpus", "given", "shown"), [(4, "", "0,1,2,3"), (1, "", "unset"), (4, "2,3", "2,3")])
def test_local_shows_all_gpus_to_be_shared(tmp_path: Path, gpus: int, given: str, shown: str) -> None:
    program(tmp_path, "nvidia-smi", f'for i in $(seq {gpus}); do echo "GPU $((i - 1)): H200 (UUID: GPU-$i)"; done')
    program(tmp_path, "py", "echo ${CUDA_VISIBLE_DEVICES-unset} >>seen")
    env = {"CUDA_VISIBLE_DEVICES": given} if given else {}
    found = bash(tmp_path, str(LAUNCH / "local.sh"), "2", PYTHON="py", PPOJAX_PORT="4000", **env)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "seen").read_text().splitlines() == [shown] * 2


def test_local_finds_what_uv_has_set_up(tmp_path: Path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program(tmp_path / ".venv/bin", "python", "echo $* >>seen")
    found = bash(tmp_path, str(LAUNCH / "local.sh"), "1", VIRTUAL_ENV="", PYTHON="", PPOJAX_PORT="4000")
    assert (found.returncode, (tmp_path / "seen").read_text()) == (0, "-m ppojax.train\n"), found.stderr


def test_local_hands_a_signal_on_and_waits(tmp_path: Path) -> None:
    program(tmp_path, "py", "trap 'exit 75' TERM; touch up$PPOJAX_PROCESS_INDEX; while :; do sleep 0.02; done")
    script = (
        f"bash {LAUNCH}/local.sh 2 & p=$!; until [ -e up0 ] && [ -e up1 ]; do sleep 0.02; done; kill -TERM $p; wait $p"
    )
    assert bash(tmp_path, "-c", script, PYTHON="py", PPOJAX_PORT="4000").returncode == 75


@pytest.mark.parametrize(
    ("code", "before", "requeued"),
    [(75, 9, True), (70, 0, True), (70, 5, False), (134, 0, True), (137, 0, True), (0, 1, False), (3, 0, False)],
)
def test_slurm_requeues_what_was_saved_or_lost(tmp_path: Path, code: int, before: int, requeued: bool) -> None:
    program(tmp_path, "srun", f'echo "$*" >started; exit {code}')
    program(tmp_path, "scontrol", 'echo "$*" >told')
    (tmp_path / ".ppojax-lost-7").write_text("lost\n" * before)
    found = bash(tmp_path, str(LAUNCH / "slurm.sbatch"), "config=a.yaml", SLURM_JOB_ID="7", PYTHON="py")
    assert found.returncode == code, found.stderr
    told = tmp_path / "told"
    assert (told.read_text() if told.exists() else "") == ("requeue 7\n" if requeued else "")
    assert (tmp_path / "started").read_text().endswith(" py -m ppojax.train config=a.yaml resume=true\n")


def test_slurm_asks_for_a_signal_and_requeueing() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    for option in ("--signal=TERM@300", "--requeue", "--ntasks-per-node=1", "--open-mode=append"):
        assert f"\n#SBATCH {option}\n" in text


def test_jobset_exports_what_the_resolver_reads() -> None:
    whole = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = whole["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert whole["spec"]["coordinator"]["replicatedJob"] == job["name"]
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    pod = {  # what JobSet and Kubernetes write on the last pod
        "metadata.annotations['jobset.sigs.k8s.io/coordinator']": "ppojax-workers-0-0.ppojax",
        "metadata.annotations['jobset.sigs.k8s.io/global-replicas']": str(job["replicas"]),
        "metadata.annotations['jobset.sigs.k8s.io/job-global-index']": str(job["replicas"] - 1),
    }
    env = {"JOB_COMPLETION_INDEX": str(spec["completions"] - 1)}
    for variable in container["env"]:
        value = variable.get("value")
        env[variable["name"]] = pod[variable["valueFrom"]["fieldRef"]["fieldPath"]] if value is None else value
    place = resolve(NOTHING, env)
    assert (place.count, place.index) == (spec["completions"], spec["completions"] - 1)
    assert place.coordinator == f"ppojax-workers-0-0.ppojax:{container['ports'][0]['containerPort']}"


def test_skypilot_runs_with_its_variables(tmp_path: Path) -> None:
    whole = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(whole) <= {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    program(tmp_path, "uv", 'echo "$*" >seen')
    found = bash(tmp_path, "-c", whole["run"], ARGS="config=a.yaml mesh.data=2")
    assert found.returncode == 0, found.stderr
    seen = (tmp_path / "seen").read_text()
    assert seen.endswith("-m ppojax.train config=a.yaml mesh.data=2 run.dir=/runs resume=true\n")


def test_modal_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Anything:
        def __getattr__(self, attribute: str) -> Any:
            return lambda *args, **kwargs: Anything()

        def __call__(self, function: Any) -> Any:  # as a decorator
            return function

    cluster = SimpleNamespace(container_rank=lambda: 1, container_ips=lambda: ["fd00::1", "fd00::2"])
    modal = ModuleType("modal")
    modal.__dict__.update(Image=Anything(), Volume=Anything(), App=lambda *_, **__: Anything(), Retries=dict)
    modal.__dict__.update(clustered=lambda **asked: calls.append(("clustered", asked)) or (lambda f: f))
    modal.__dict__.update(Cluster=SimpleNamespace(from_context=lambda: cluster))
    monkeypatch.setitem(sys.modules, "modal", modal)
    monkeypatch.setattr(subprocess, "run", lambda command, **how: calls.append((" ".join(command), how)))
    runpy.run_path(str(LAUNCH / "modal_app.py"))["train"]("config=a.yaml mesh.data=2")
    (_, asked), (command, how) = calls
    assert asked == {"size": 2, "rdma": True}
    assert command.endswith("-m ppojax.train config=a.yaml mesh.data=2 run.dir=/runs resume=true")
    assert resolve(NOTHING, how["env"])[:3] == ("[fd00::1]:8476", 2, 1)
