"""Who is who, from the variables that each launcher sets."""

from __future__ import annotations

import pytest

from ppojax.errors import ConfigError
from ppojax.processes.resolve import Place, resolve, share
from ppojax.processes.settings import ProcessesConfig

SLURM = {
    "SLURM_JOB_ID": "4212345",
    "SLURM_JOB_NODELIST": "gpu[007-010]",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[007-008,010]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_TASK_ID": "sky-managed-2026-11-21-09-00-00-000000_ppojax_1-0",
}
JOBSET = {
    "JOBSET_COORDINATOR": "ppojax-workers-0-0.ppojax",
    "JOBSET_GLOBAL_REPLICAS": "2",
    "JOBSET_JOB_GLOBAL_INDEX": "1",
    "JOBSET_PODS_PER_JOB": "4",
    "JOB_COMPLETION_INDEX": "3",
}
OURS = {
    "PPOJAX_COORDINATOR": "[fd00::1]:8476",
    "PPOJAX_PROCESS_COUNT": "4",
    "PPOJAX_PROCESS_INDEX": "2",
}
NOTHING = ProcessesConfig()


def without(env: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in env.items() if key != name}


def test_nothing_said_is_one_process() -> None:
    place = resolve(NOTHING, {"HOME": "/root"})
    assert place == Place() and place.alone and place.writes


@pytest.mark.parametrize(
    ("env", "place"),
    [
        (SLURM, Place("gpu007:63097", 6, 5, (1,), "slurm")),
        (OPEN_MPI, Place(f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 4, 3, (1,), "openmpi")),
        (SKYPILOT, Place("10.0.0.4:8476", 2, 1, None, "skypilot")),
        (JOBSET, Place("ppojax-workers-0-0.ppojax:8476", 8, 7, None, "jobset")),
        (OURS, Place("[fd00::1]:8476", 4, 2, None, "ppojax")),
    ],
    ids=["slurm", "openmpi", "skypilot", "jobset", "ppojax"],
)
def test_each_launcher(env: dict[str, str], place: Place) -> None:
    assert resolve(NOTHING, env) == place
    assert resolve(ProcessesConfig(source=place.source), env) == place
    assert resolve(ProcessesConfig(source="none"), env) == Place()


def test_the_innermost_launcher_is_meant() -> None:
    everything: dict[str, str] = {}
    for env, name in ((SLURM, "slurm"), (JOBSET, "jobset"), (SKYPILOT, "skypilot"), (OPEN_MPI, "openmpi")):
        everything |= env
        assert resolve(NOTHING, everything).source == name
    assert resolve(NOTHING, everything | OURS).source == "ppojax"
    assert resolve(ProcessesConfig(source="slurm"), everything).count == 6


def test_settings_go_before_the_environment_field_by_field() -> None:
    whole = ProcessesConfig(coordinator="node:1234", count=3, index=0)
    assert resolve(whole, SLURM) == Place("node:1234", 3, 0, None, "settings")
    assert resolve(ProcessesConfig(coordinator="node:1234"), SLURM) == Place("node:1234", 6, 5, (1,), "slurm")
    assert resolve(ProcessesConfig(count=1), SLURM).alone
    assert resolve(ProcessesConfig(local_devices=(4, 5)), SLURM).local_devices == (4, 5)


def test_a_batch_script_without_srun_is_one_process() -> None:
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert resolve(NOTHING, batch).alone
    assert resolve(NOTHING, SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).alone  # srun --pty bash


@pytest.mark.parametrize(
    ("hosts", "first"), [("node1", "node1"), ("a-1,b-2", "a-1"), ("n[03,7]", "n03"), ("r[1-2]x,y", "r1x")]
)
def test_the_first_host_of_slurm(hosts: str, first: str) -> None:
    place = resolve(NOTHING, SLURM | {"SLURM_STEP_NODELIST": hosts})
    assert place.coordinator == f"{first}:63097"


@pytest.mark.parametrize(
    ("index", "count", "visible", "devices"),
    [
        (0, 1, None, None),
        (3, 8, None, (3,)),
        (1, 2, "0,1,2,3,4,5,6,7", (4, 5, 6, 7)),
        (1, 4, "GPU-a,GPU-b,GPU-c,GPU-d", (1,)),
        (3, 8, "0", None),  # it is shown its own
        (0, 2, "", None),  # and none at all: a CPU
    ],
)
def test_devices_of_one_machine_are_shared(
    index: int, count: int, visible: str | None, devices: tuple[int, ...] | None
) -> None:
    assert share(index, count, visible) == devices


def test_slurm_that_binds_devices_leaves_nothing_to_share() -> None:
    env = SLURM | {"SLURM_GPUS_PER_TASK": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert resolve(NOTHING, env).local_devices is None


def test_open_mpi_on_one_machine_needs_no_address() -> None:
    one = {**without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert resolve(NOTHING, one).coordinator == "127.0.0.1:8476"
    six = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370"}
    assert resolve(NOTHING, six).coordinator.startswith("[fe80::b9b]:")


@pytest.mark.parametrize(
    ("settings", "env", "text"),
    [
        (
            {},
            without(SKYPILOT, "SKYPILOT_NODE_IPS"),
            "SKYPILOT_NODE_IPS: not set, where the launcher's other variables",
        ),
        ({}, SKYPILOT | {"SKYPILOT_NODE_IPS": "10.0.0.4"}, "1 addresses, SKYPILOT_NUM_NODES says 2"),
        ({}, SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x: expected a whole number of at least 0"),
        ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "0"}, "expected a whole number of at least 1"),
        ({}, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "expected a form such as 2"),
        ({}, SLURM | {"SLURM_NODEID": "3"}, "SLURM_NODEID=3: SLURM_STEP_TASKS_PER_NODE names 3 nodes"),
        ({}, SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "2 processes on this machine cannot share these equally"),
        ({}, OURS | {"PPOJAX_PROCESS_INDEX": "4"}, "there are 4 processes \\(ppojax\\); their numbers are 0 to 3"),
        (
            {},
            without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"),
            "processes.coordinator: not set, and the environment of openmpi",
        ),
        ({"count": 2}, {}, "processes.coordinator and processes.index: not set, and no launcher's environment"),
        ({"count": 2, "index": 2, "coordinator": "a"}, {}, "processes.index=2: there are 2 processes"),
        ({"count": 2, "index": 1, "coordinator": "x:y:z"}, {}, "processes.coordinator=x:y:z: expected host:port"),
        ({"count": 2, "index": 1, "coordinator": "a b:1"}, {}, "expected host:port, the same in every process"),
        ({"source": "slurm"}, {}, "processes.source=slurm: SLURM_STEP_NUM_TASKS is not set"),
    ],
)
def test_what_is_missing_or_wrong_is_named(settings: dict, env: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolve(ProcessesConfig(**settings), env)
