"""The environment of a process that is to see a number of devices where there is no accelerator."""

from __future__ import annotations

import os

_FLAG = "--xla_force_host_platform_device_count"


def environment_with(devices: int) -> dict[str, str]:
    """This process's environment, with so many host devices; accelerators stay as they are."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(f"{_FLAG}=")]
    return os.environ | {"XLA_FLAGS": " ".join([*flags, f"{_FLAG}={devices}"])}
