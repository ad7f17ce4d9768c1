"""Settings of runs that are made of many processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppojax.component import Component

Source = Literal["auto", "none", "ppojax", "openmpi", "skypilot", "jobset", "slurm"]


class ProcessesConfig(Component):
    """Which process of how many this is. What is not set here is taken from the launcher's environment."""

    coordinator: str | None = Field(
        default=None, description="host:port of process 0, at which all meet; null: as the launcher says"
    )
    count: int | None = Field(
        default=None, ge=1, description="processes of the run; null: as the launcher says, 1 without one"
    )
    index: int | None = Field(default=None, ge=0, description="which of them this one is; null: as the launcher says")
    local_devices: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="GPUs of this machine that are this process's, counted among those that it sees; null: all, or its "
        "share where the launcher starts several processes on a machine",
    )
    source: Source = Field(
        default="auto",
        description="which launcher's environment is read; auto: the first that is there of ppojax (launch/local.sh, "
        "launch/modal_app.py), openmpi, skypilot, jobset (Kubernetes), slurm; none: no environment",
    )
    timeout_s: int = Field(
        default=300, ge=1, description="seconds that processes wait for each other at the start, before exit code 70"
    )
    heartbeat_s: int = Field(
        default=60,
        ge=2,
        description="seconds without a sign of life after which a process counts as dead: exit code 70",
    )
