"""One run a folder: a lock file that tells who holds it, and that a holder who is gone does not keep.

It is made by an exclusive open, which is atomic on NFS too, where file locks need a server that has them. Whether its
process still lives is asked on the same machine and seen from another by the file's age: the holder touches it.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_cmli.common.cli import leave
from ds_cmli.common.errors import UserError
from ds_cmli.distributed import process_group as distributed

NAME = "run.lock"
BEAT = 15.0  # seconds between two touches
LEASE = 180.0  # seconds without one after which a holder on another machine is gone; NFS shows a touch after up to 60


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The lock on a run's folder, which rank 0 holds for all; none where a dry run has left no folder. Collective.

    Raises:
        UserError: on every rank, where another run holds it.
    """
    lock = Lock(folder)
    error = distributed.broadcast_object(
        lock.take() if distributed.is_main() and folder.is_dir() else None
    )  # collective
    if error is not None:
        raise UserError(error)
    try:
        yield
    finally:
        if distributed.is_main():
            lock.give_back()


class Lock:
    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        self.own: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "place": _place(),
            "started": _started(os.getpid()),
            "slurm": [os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")],
            "token": uuid.uuid4().hex,
        }
        self.ended = threading.Event()

    def take(self) -> str | None:
        """Hold the lock from now on, or tell why not."""
        try:
            while not self._make():
                found, age = self._holder()
                if found != {} and self._lives(found, age):
                    return self._line(found, age)
                self._push_aside(found)
        except OSError as error:
            return f"--output-dir is {str(self.folder)!r}: cannot lock it: {error.strerror}"
        threading.Thread(target=self._beat, daemon=True).start()
        return None

    def give_back(self) -> None:
        self.ended.set()
        with contextlib.suppress(OSError):
            if self._holder()[0] == self.own:
                self.path.unlink()

    def _make(self) -> bool:
        try:
            with open(self.path, "x") as file:
                json.dump(self.own, file)
        except FileExistsError:
            return False
        return True

    def _holder(self) -> tuple[dict[str, Any] | None, float]:
        """Who holds the lock, {} for nobody, None where it cannot be read (yet); and its age by the server's clock."""
        probe = self.path.with_name(f"{NAME}.{self.own['token']}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        try:
            age = now - self.path.stat().st_mtime
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}, 0.0
        except ValueError:
            return None, age
        return found if isinstance(found, dict) else None, age

    def _lives(self, found: dict[str, Any] | None, age: float) -> bool:
        if found is not None and found.get("place") == self.own["place"]:
            return found.get("started") == _started(found.get("pid"))
        job, restarts = (found or {}).get("slurm") or (None, None)
        if job and [job, restarts] != self.own["slurm"] and job == self.own["slurm"][0]:
            return False  # an earlier start of this job, which Slurm has ended
        return age < LEASE

    def _line(self, found: dict[str, Any] | None, age: float) -> str:
        if found is None:
            return f"{self.path} cannot be read: another start is just making it, or remove it"
        line = (
            f"--output-dir is {str(self.folder)!r}: in use since {found.get('since')} by process {found.get('pid')} on "
            f"{found.get('host')}: end that run, or give another --output-dir"
        )
        if found.get("place") != self.own["place"]:
            line += f" (last sign of life {max(0.0, age):.0f} s ago; without one for {LEASE:.0f} s the folder is free)"
        return line

    def _push_aside(self, stale: dict[str, Any] | None) -> None:
        """Remove the lock of a holder that is gone, and no other that has been made since."""
        aside = self.path.with_name(f"{NAME}.{self.own['token']}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)  # of several starts one alone gets it
            moved = aside.read_text()
            if stale is not None and moved != json.dumps(stale):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):
                found, _ = self._holder()
                if found and found != self.own:  # this process stood still for longer than the lease
                    print(f"error: {self._line(found, 0.0)}", flush=True)
                    leave(2)
                os.utime(self.path)


def _place() -> str:
    """Where a process's number means the same process: this start of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return socket.gethostname()


def _started(pid: Any) -> str | None:
    """What tells a process from a later one of the same number; None where it is gone."""
    try:
        with open(f"/proc/{int(pid)}/stat") as file:
            state, *rest = file.read().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]  # a zombie writes nothing any more
    except (OSError, TypeError, ValueError, IndexError):
        pass
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(int(pid), 0)
    except (OSError, TypeError, ValueError):
        return None
    return "running"
