"""The folder of a run: made by its first start, and held by one start at a time.

`run.lock` names the process that holds it and is touched every 15 seconds. It is free if that
process does not run any more on this node, if another node's has not touched it for three minutes,
or if the holder is an earlier start of the same job.

Looking at the file and replacing it are one action: a lock of filelock beside it, held for that
time alone, lets no second start in between. filelock uses flock, also over NFS, or an exclusively
created file if the file system has no flock.
"""

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock

from ds_cmli.checkpoint.storage import root_of
from ds_cmli.config.schema import Config
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed import this_node
from ds_cmli.errors import UserError, blame
from ds_cmli.files import read_json

LOCK = "run.lock"
LOCK_TOUCH_SECONDS = 15.0  # between two touches of the lock
LEASE_SECONDS = 180.0  # untouched for so long, another node's holder has ended; NFS is 60 s late
JOB = "DS_CMLI_JOB"  # variable that names the job where another scheduler than Slurm restarts it


@contextmanager
def run_folder(config: Config, resume: str) -> Iterator[Path]:
    """Make the run's folder and hold its lock inside. Collective.

    A new folder is removed at the end if it is empty. Raises `UserError` if another run holds it.
    """
    output_dir = config.run.output_dir
    if not output_dir and resume not in ("auto", "never"):
        output_dir = str(root_of(resume).parent)  # of the run in `--resume PATH`
    base = Path(output_dir or f"runs/{config.run.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = base
    made_folders: list[Path] = []
    with written_together(base):  # collective
        if distributed.is_main():
            numbers = itertools.count(2)
            while not output_dir and folder.exists():  # another start made it in this second
                folder = base.with_name(f"{base.name}.{next(numbers)}")
            made_folders += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
    try:
        folder = distributed.broadcast_object(folder)  # collective
        with run_lock(folder):  # collective
            yield folder
    finally:
        with suppress(OSError):
            for path in made_folders:
                path.rmdir()


@dataclass(frozen=True)
class Holder:
    """The process that holds a run's folder, as `run.lock` names it."""

    host: str
    pid: int
    started: float  # seconds since the epoch
    job: list[str | None]  # the scheduler's job and its start; [None, None] without one

    @classmethod
    def of_this_process(cls) -> "Holder":
        started = psutil.Process().create_time()
        job = [os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")]
        if os.environ.get(JOB):
            job = [os.environ[JOB], f"{os.getpid()} {started}"]
        return cls(socket.gethostname(), os.getpid(), started, job)

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Return the holder that a lock names; None if there is no whole lock."""
        with suppress(FileNotFoundError, ValueError, TypeError, RecursionError):
            return cls(**read_json(path))
        return None

    def is_running(self, new_holder: "Holder", seconds_since_touch: float) -> bool:
        """Return True if this holder still runs, as far as `new_holder` can tell."""
        job, restart = self.job
        new_job, new_restart = new_holder.job
        if job is not None and job == new_job and restart != new_restart:
            return False  # an earlier start of the same job, which its scheduler has ended
        if self.host != new_holder.host:
            return seconds_since_touch < LEASE_SECONDS
        try:
            process = psutil.Process(self.pid)
            is_dead = process.status() == psutil.STATUS_ZOMBIE  # nobody has waited for it yet
            return not is_dead and abs(process.create_time() - self.started) < 1
        except psutil.Error:
            return False


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder inside, by rank 0 for all ranks.

    Raises `UserError` on every rank if another run holds it. Collective.
    """
    path = folder / LOCK
    holder = Holder.of_this_process()
    released = threading.Event()

    def touch_lock(descriptor: int) -> None:
        while not released.wait(LOCK_TOUCH_SECONDS):
            with suppress(OSError):
                os.utime(descriptor)
        os.close(descriptor)

    with written_together(folder):  # collective
        if distributed.is_main():
            _take(path, holder)
            # The descriptor stays that of this holder's file, also if another start replaces it.
            descriptor = os.open(path, os.O_RDWR)
            threading.Thread(target=touch_lock, args=[descriptor], daemon=True).start()
    try:
        with distributed.raised_together():  # collective
            if not path.exists():
                raise UserError(
                    f"--output-dir is {str(folder)!r}: {this_node()} does not see what rank 0 "
                    "writes there: give a shared folder"
                )
        yield
    finally:
        released.set()
        if distributed.is_main():
            with suppress(OSError), _exclusive(path):
                if Holder.read(path) == holder:  # otherwise another start has taken it over
                    path.unlink()


@contextmanager
def written_together(folder: Path) -> Iterator[None]:
    """Raise a `UserError` on all ranks if rank 0 cannot write inside. Collective."""
    place = f"--output-dir is {str(folder)!r}: cannot write there"
    with distributed.raised_together(), blame(place):  # collective
        yield


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Keep other starts from reading or replacing the lock `path` inside."""
    guard = path.with_name(path.name + ".guard")
    with FileLock(guard, timeout=LEASE_SECONDS):
        try:
            yield
        finally:
            # A start that waits for this file notices that it is gone, and makes another.
            guard.unlink(missing_ok=True)


def _take(path: Path, holder: Holder) -> None:
    """Write the lock of this start. Raises `UserError` if another run holds the folder."""
    with _exclusive(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file: remove it, or give another --output-dir")
        previous = Holder.read(path)
        if previous is not None:
            age = time.time() - path.stat().st_mtime
            if previous.is_running(holder, age):
                raise UserError(
                    f"--output-dir is {str(path.parent)!r}: in use by process {previous.pid} on "
                    f"{previous.host}, which gave a sign {age:.0f} s ago: give another"
                )
        # Write a new file, because a holder that still runs goes on touching the old one.
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(asdict(holder)))
