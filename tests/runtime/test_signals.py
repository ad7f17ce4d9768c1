import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ppojax.runtime.signals import StopSignals


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited 30 s in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_raises_a_flag_and_nothing_else(number, caplog):
    with StopSignals() as signals:
        assert not signals.should_stop() and signals.received() is None
        os.kill(os.getpid(), number)
        wait_for(signals.should_stop)
        assert signals.received() == number.name
    assert f"{number.name}: stopping at the next safe point" in caplog.text


def test_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    threads = threading.active_count()
    with pytest.raises(KeyError), StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_another_signal_is_not_a_request_to_stop():
    former = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(signals.should_stop)
            assert signals.received() == "SIGTERM"
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with StopSignals() as signals:
            seen.append((signals.should_stop(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


CHILD = """
import sys, time
from ppojax.runtime.signals import StopSignals
try:
    with StopSignals() as signals:
        print("ready", flush=True)
        {body}
finally:
    print("cleaned up", flush=True)
"""

POLLS = """
        while not signals.should_stop():
            time.sleep(0.005)
        print("asked", flush=True)
        time.sleep(60)
"""

# One call of C code that runs for minutes without letting a Python handler run, but lets other threads run.
DEAF = """
        import hashlib
        print("asked", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
"""


def start(body):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(body=body.strip())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_the_process_at_once(second, code):
    child = start(POLLS)
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "asked\n"
    child.send_signal(second)
    out, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert out == "" and f"{second.name} again: stopped without saving" in err


def test_the_second_signal_ends_a_process_that_is_deep_in_a_device_call():
    child = start(DEAF)
    assert child.stdout.readline() == "asked\n"
    child.send_signal(signal.SIGTERM)
    assert "stopping at the next safe point" in child.stderr.readline()
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == 143
