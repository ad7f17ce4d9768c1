"""The age of a process, against a clock outside of it."""

from __future__ import annotations

import subprocess
import sys
import time

from ppojax.runtime.age import process_age


def test_imports_count() -> None:
    """A process that slept before its first import tells of that, too."""
    begin = time.monotonic()
    code = "import time; time.sleep(.2); from ppojax.runtime.age import process_age; print(process_age())"
    out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert 0.19 <= float(out.stdout) <= time.monotonic() - begin + 0.02
    assert process_age() > 0.2
