"""A process gets its limit of the CPU's time, however many others there are."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.gpu import limits

BUSY = "import time\nwhile time.process_time() < {}: pass"


def started(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_process_that_ends_within_its_limit():
    assert limits.wait(started("raise SystemExit(3)"), 5) == 3
    done = limits.run([sys.executable, "-c", "print('out'); raise SystemExit('err')"], 5, {}, Path("/"))
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")


def test_time_that_others_have_does_not_count():
    process = started(BUSY.format(0.2))
    process.send_signal(signal.SIGSTOP)  # as if others had all of the CPU
    threading.Timer(2, process.send_signal, [signal.SIGCONT]).start()
    start = time.monotonic()
    assert limits.wait(process, 1) == 0
    assert time.monotonic() - start >= 2


def test_what_exceeds_its_limit_is_ended_with_its_children():
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY.format(600)!r}])"
    process = started(code)
    with pytest.raises(AssertionError, match="longer than 1 s of the CPU's time"):
        limits.wait(process, 1)
    assert process.returncode == -9
    with pytest.raises(AssertionError, match="1 s without any of the CPU's time"):
        limits.wait(started("import time\ntime.sleep(600)"), 60, idle_s=1)
