"""How long this process has been there."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()


def process_age() -> float:
    """Seconds since this process was started; where the system does not tell, since this module was imported."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
        started = float(after_name.split()[19]) / os.sysconf("SC_CLK_TCK")  # field 22, since the machine was
    except OSError:
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
