"""The runs of a plan, one after another, each by train.py in a process and a folder of its own.

A signal is passed on to the run in progress, which saves and ends; started again, the plan goes on
with it. A run whose plan is killed gets a signal too.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ds_cmli.common.cli import say
from ds_cmli.distributed.launchers import environment_without_rank
from ds_cmli.faults.preemption import EXIT_CODE, SIGNALS
from profiling.learning.plan import PLUGIN, Run
from profiling.scripts import ROOT

TRAIN = ["-m", "ds_cmli.train", "--plugin", PLUGIN]
OUTPUT = "output.log"  # in a run's folder: what train.py printed
SECONDS = "ablation-seconds"  # in a run's folder: the wall time of all its starts that ended
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class Signals:
    """Handles the signals that ask for an end: notes them, and passes them on to a process."""

    def __init__(self) -> None:
        self.received = False
        self.process: subprocess.Popen | None = None
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self.process is not None:
            self.process.send_signal(number)

    def wait(self, process: subprocess.Popen) -> int:
        """Wait for a process, which gets all signals meanwhile; returns its exit code."""
        self.process = process
        if self.received:  # before there was a process to pass it on to
            process.terminate()
        code = process.wait()
        self.process = None
        return code


def train_all(
    runs: Sequence[Run], out: Path, afterwards: Sequence[str], done: Callable[[Run, Path], None]
) -> list[str] | None:
    """Train each run to its end.

    Args:
        out: the folder of the runs' folders.
        afterwards: the endpoints to measure of a run that has ended.
        done: called after each run that has ended well, with its folder.

    Returns:
        A line for each run that failed; None if a signal came before all had their turn.
    """
    signals, failures = Signals(), []
    for number, run in enumerate(runs, 1):
        folder = out / run.name
        say(f"run {number} of {len(runs)}: {run.name}, to {folder}")
        code = train(run, folder, signals)
        if code == 0 and afterwards:
            code = start(measuring(folder, afterwards), folder, signals)
        if code == 0:
            done(run, folder)
        elif code != EXIT_CODE and not signals.received:
            failures.append(f"run {run.name} ended with exit code {code}: {_last_line(folder)}")
            say(failures[-1])
        if code == EXIT_CODE or signals.received:
            return None
    return failures


def train(run: Run, folder: Path, signals: Signals) -> int:
    """Train a run to its end or a signal, and return the exit code of train.py."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    code = start([*TRAIN, *run.arguments(folder)], folder, signals)
    seconds = seconds_of(folder) + time.monotonic() - started
    (folder / SECONDS).write_text(f"{seconds:.1f}\n")
    return code


def measuring(folder: Path, endpoints: Sequence[str]) -> list[str]:
    return ["-m", "profiling.learning.endpoints", str(folder.resolve()), *endpoints]


def start(arguments: Sequence[str], folder: Path, signals: Signals) -> int:
    """Run Python, with its output in the run's folder, and return its exit code."""
    with (folder / OUTPUT).open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment_without_rank(), "PYTHONPATH": _path()},
            preexec_fn=_end_with_parent,
        )
        return signals.wait(process)


def _path() -> str:
    """The folders of modules, with the repository, of which `profiling` is a package."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def _end_with_parent() -> None:
    """Ask Linux to send this process TERM, at which a run saves, when its parent has ended."""
    with suppress(AttributeError):  # another system: a killed plan leaves its run to end
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def seconds_of(folder: Path) -> float:
    """The wall time of a run's starts, without those during which this command was killed."""
    with suppress(FileNotFoundError, ValueError):
        return float((folder / SECONDS).read_text())
    return 0.0


def _last_line(folder: Path) -> str:
    lines = (folder / OUTPUT).read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it printed nothing"
    return f"{last} ({folder / OUTPUT})"
