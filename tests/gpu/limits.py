"""Limits in time for processes of tests, on machines that others use too.

What counts is what a process gets of the CPU, not the clock: at a load of 30 a test on two cores takes fifteen times as
long and still does the same.
"""

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

IDLE_S = 300  # without any time of the CPU: it waits for what does not come
EVERY_S = 0.2


class Limit:
    """What a process and its children have used, second by second.

    Of several processes the one that gets most counts, as they run side by side; of several threads no more than one.
    """

    def __init__(self, pid: int, limit_s: float, idle_s: float = IDLE_S):
        self.pid, self.limit_s, self.idle_s = pid, limit_s, idle_s
        self.used_s = 0.0
        self.seen: dict[int, float] = {}
        self.last = self.progress = time.monotonic()

    def processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        return []

    def exceeded(self) -> str:
        """Look again; "" or which limit is exceeded."""
        most, now = 0.0, time.monotonic()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                times = process.cpu_times()
                total = times.user + times.system
                most = max(most, total - self.seen.get(process.pid, 0.0))
                self.seen[process.pid] = total
        self.used_s += min(most, now - self.last)
        self.last = now
        if most > 0:
            self.progress = now
        if self.used_s > self.limit_s:
            return f"longer than {self.limit_s:.0f} s of the CPU's time"
        if now - self.progress > self.idle_s:
            return f"{self.idle_s:.0f} s without any of the CPU's time"
        return ""

    def kill(self) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def wait(process: subprocess.Popen, limit_s: float, idle_s: float = IDLE_S) -> int:
    """Wait for a process to end; where it exceeds a limit, end it and raise `AssertionError`."""
    limit = Limit(process.pid, limit_s, idle_s)
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(EVERY_S)
        if reason := limit.exceeded():
            limit.kill()
            process.wait()
            raise AssertionError(reason)


def run(
    command: Sequence[str], limit_s: float, env: Mapping[str, str], cwd: Path, idle_s: float = IDLE_S
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its output, as `subprocess.run` does; limited as `wait` is."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=output, stderr=errors)
        code = wait(process, limit_s, idle_s)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, code, output.read(), errors.read())
