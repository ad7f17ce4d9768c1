"""Memory of CPU runs: freed buffers are kept for the next step."""

from __future__ import annotations

import ctypes
import sys

# Constants of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = -1


def keep_freed_memory() -> bool:
    """Ask glibc to reuse freed memory instead of returning it; True when it does.

    By default every large buffer of a step comes as fresh pages, which the kernel has to clear: on two cores that was
    a third of the time of an update of 135M parameters. The process stays as large as its largest step was, and what
    lies between buffers stays too (6.7 GB there instead of 5.4).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another libc
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, NEVER), mallopt(M_ARENA_MAX, 1)])
