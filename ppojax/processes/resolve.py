"""Who is who among the processes of a run: from explicit settings, or from a launcher's environment.

Precedence, field by field: explicit settings, then one environment. Where several are there, the innermost launcher is
meant: `ppojax` (our own variables, which launch/local.sh and launch/modal_app.py set), Open MPI (which may run inside
the others), SkyPilot (which may run on Kubernetes or Slurm), Kubernetes JobSet, Slurm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ppojax.errors import ConfigError
from ppojax.processes.settings import ProcessesConfig

Env = Mapping[str, str]

PORT = 8476  # of process 0, where the launcher has no say and a machine runs one job
PORTS = 4096  # from which jobs of one machine get different ones, below the end of all ports


class Place(NamedTuple):
    """One process among those of a run."""

    coordinator: str = ""  # host:port of process 0
    count: int = 1
    index: int = 0
    local_devices: tuple[int, ...] | None = None  # None: all that it sees
    source: str = "none"  # where this was found

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def writes(self) -> bool:
        """Whether this process leaves files."""
        return self.index == 0


class _Found(NamedTuple):
    """What one environment says; None where it says nothing."""

    coordinator: str | None
    count: int
    index: int
    local_index: int = 0
    local_count: int = 1
    bound: bool = False  # the launcher shows each process only its own devices


def here(settings: ProcessesConfig) -> Place:
    """Resolve with the environment of this process."""
    return resolve(settings, os.environ)


def resolve(settings: ProcessesConfig, env: Env) -> Place:
    """Find this process's place from settings and an environment; a pure function of both.

    Raises:
        ConfigError: the environment lacks a variable or has a wrong one, or something is not said anywhere.
    """
    if settings.count == 1 and settings.index in (None, 0):
        return Place(local_devices=settings.local_devices, source="settings")
    explicit = (settings.coordinator, settings.count, settings.index)
    name, found = ("settings", None) if None not in explicit else _environment(settings.source, env)
    if found is None and explicit == (None, None, None):
        return Place(local_devices=settings.local_devices)
    coordinator = settings.coordinator or (found.coordinator if found else None)
    count = settings.count or (found.count if found else None)
    index = settings.index if settings.index is not None or found is None else found.index
    if count == 1 and index in (None, 0):
        return Place(local_devices=settings.local_devices, source=name)
    said = {"coordinator": coordinator, "count": count, "index": index}
    if missing := [f"processes.{field}" for field, value in said.items() if value is None]:
        where = "no launcher's environment was found" if found is None else f"the environment of {name} has none"
        raise ConfigError(f"{' and '.join(missing)}: not set, and {where}; set {'it' if len(missing) == 1 else 'them'}")
    assert coordinator is not None and count is not None and index is not None
    if index >= count:
        raise ConfigError(
            f"processes.index={index}: there are {count} processes ({name}); their numbers are 0 to {count - 1}"
        )
    devices = settings.local_devices
    if devices is None and found is not None and not found.bound:
        devices = share(found.local_index, found.local_count, env.get("CUDA_VISIBLE_DEVICES"))
    return Place(_with_port(coordinator), count, index, devices, name)


def share(index: int, count: int, visible: str | None) -> tuple[int, ...] | None:
    """Devices of process `index` among `count` on one machine, by position in CUDA_VISIBLE_DEVICES.

    An equal part of what is visible; one device each where that is not known; all where each already sees its own.
    """
    if count == 1:
        return None
    if visible is None:
        return (index,)
    each, rest = divmod(len([name for name in visible.split(",") if name.strip()]), count)
    if each == 0:
        return None
    if rest:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible}: {count} processes on this machine cannot share these equally; "
            "set processes.local_devices"
        )
    return tuple(range(index * each, (index + 1) * each))


def _environment(source: str, env: Env) -> tuple[str, _Found | None]:
    if source == "none":
        return "none", None
    if source != "auto":
        marker, read = _READERS[source]
        if marker not in env:
            raise ConfigError(f"processes.source={source}: {marker} is not set; start under it, or set another source")
        return source, read(env)
    return next(((name, read(env)) for name, (marker, read) in _READERS.items() if marker in env), ("none", None))


def _ppojax(env: Env) -> _Found:
    return _Found(
        _text(env, "PPOJAX_COORDINATOR"),
        _number(env, "PPOJAX_PROCESS_COUNT", 1),
        _number(env, "PPOJAX_PROCESS_INDEX"),
        _number(env, "PPOJAX_LOCAL_INDEX") if "PPOJAX_LOCAL_INDEX" in env else 0,
        _number(env, "PPOJAX_LOCAL_COUNT", 1) if "PPOJAX_LOCAL_COUNT" in env else 1,
    )


def _open_mpi(env: Env) -> _Found:
    """`mpirun`; version 4 says where it runs, which has to be process 0's machine."""
    count, local = _number(env, "OMPI_COMM_WORLD_SIZE", 1), _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    launcher = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    host = "127.0.0.1" if count == local else None
    if host is None and launcher is not None:
        host = launcher[1] or f"[{launcher[2]}]"
    job = re.match(r"\d+", env.get("OMPI_MCA_orte_hnp_uri", ""))
    coordinator = None if host is None else f"{host}:{_port(int(job[0]) // 4096 if job else None)}"
    rank, local_rank = _number(env, "OMPI_COMM_WORLD_RANK"), _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
    return _Found(coordinator, count, rank, local_rank, local)


def _skypilot(env: Env) -> _Found:
    """One process a node; the first address is the head's, which has rank 0."""
    count, rank = _number(env, "SKYPILOT_NUM_NODES", 1), _number(env, "SKYPILOT_NODE_RANK")
    hosts = _text(env, "SKYPILOT_NODE_IPS").split()
    if len(hosts) != count:
        raise ConfigError(
            f"SKYPILOT_NODE_IPS: {len(hosts)} addresses, SKYPILOT_NUM_NODES says {count}: start the task again"
        )
    return _Found(_host(hosts[0]), count, rank)


def _jobset(env: Env) -> _Found:
    """One process a pod. Only the completion index is set by Kubernetes; launch/jobset.yaml exports the rest."""
    pods, jobs = _number(env, "JOBSET_PODS_PER_JOB", 1), _number(env, "JOBSET_GLOBAL_REPLICAS", 1)
    job, pod = _number(env, "JOBSET_JOB_GLOBAL_INDEX"), _number(env, "JOB_COMPLETION_INDEX")
    return _Found(_text(env, "JOBSET_COORDINATOR"), pods * jobs, job * pods + pod)


def _slurm(env: Env) -> _Found:
    """`srun` alone sets the variables of a step: the batch script itself, or a lone `python` in it, is one process."""
    count, rank = _number(env, "SLURM_STEP_NUM_TASKS", 1), _number(env, "SLURM_PROCID")
    if count == 1:
        return _Found(None, count, rank)
    host = _first_host(_text(env, "SLURM_STEP_NODELIST"))
    tasks = _tasks_per_node(_text(env, "SLURM_STEP_TASKS_PER_NODE"))
    node = _number(env, "SLURM_NODEID")
    if node >= len(tasks):
        raise ConfigError(f"SLURM_NODEID={node}: SLURM_STEP_TASKS_PER_NODE names {len(tasks)} nodes")
    coordinator = f"{host}:{_port(_number(env, 'SLURM_JOB_ID'))}"
    bound = "SLURM_GPUS_PER_TASK" in env  # which binds them
    return _Found(coordinator, count, rank, _number(env, "SLURM_LOCALID"), tasks[node], bound)


# By precedence; each with the variable by which it is known.
_READERS: Mapping[str, tuple[str, Callable[[Env], _Found]]] = {
    "ppojax": ("PPOJAX_PROCESS_COUNT", _ppojax),
    "openmpi": ("OMPI_COMM_WORLD_SIZE", _open_mpi),
    "skypilot": ("SKYPILOT_NUM_NODES", _skypilot),
    "jobset": ("JOBSET_COORDINATOR", _jobset),
    "slurm": ("SLURM_STEP_NUM_TASKS", _slurm),
}


def _text(env: Env, name: str) -> str:
    value = env.get(name, "").strip()
    if not value:
        raise ConfigError(f"{name}: not set, where the launcher's other variables are; start under the launcher anew")
    return value


def _number(env: Env, name: str, least: int = 0) -> int:
    value = _text(env, name)
    if not re.fullmatch(r"\d{1,9}", value) or int(value) < least:
        raise ConfigError(f"{name}={value}: expected a whole number of at least {least}; start under the launcher anew")
    return int(value)


def _first_host(hosts: str) -> str:
    """`gpu[007-010,015],login` -> `gpu007`."""
    found = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", hosts)
    if found is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={hosts}: expected names of hosts; set processes.coordinator")
    return "".join(part or "" for part in found.groups())


def _tasks_per_node(tasks: str) -> list[int]:
    """`2(x3),1` -> 2, 2, 2, 1."""
    out: list[int] = []
    for part in tasks.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={tasks}: expected a form such as 2(x3),1")
        out += [int(found[1])] * int(found[2] or 1)
    return out


def _port(job: int | None) -> int:
    return PORT if job is None else 65536 - PORTS + job % PORTS


def _host(address: str) -> str:
    """An address of IPv6 stands in brackets before a port."""
    return f"[{address}]" if address.count(":") > 1 and not address.startswith("[") else address


def _with_port(coordinator: str) -> str:
    whole = coordinator if re.search(r"\]:\d+$", coordinator) else _host(coordinator)
    if whole.endswith("]") or ":" not in whole:
        whole = f"{whole}:{PORT}"
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):\d{1,5}", whole):
        raise ConfigError(f"processes.coordinator={coordinator}: expected host:port, the same in every process")
    return whole
