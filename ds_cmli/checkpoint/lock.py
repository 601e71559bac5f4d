"""A lock file that keeps two runs out of one folder. It is taken over when its holder has ended.

It is created by an exclusive open, which is atomic on NFS too, where file locks depend on the
server. On the same machine the operating system says whether the holder is alive. From another
machine the file's age shows it, because the holder touches the file regularly.

A stale lock is replaced, never removed first, because another start could create one in between.
Starts that take it over take turns, by a lock of the operating system on a second file.

A holder that only seemed to have ended, for instance one whose node is cut off from Slurm, must not
write any more. It looks at the lock each second, and before each write to the folder (`check`), and
ends if the lock is another's. Who has taken it over gives it time for that, and leaves the lock in
its place at the end, for a holder that was suspended all the while. Of what could still be on its
way, lines go to a file that the new holder has replaced, and a rename fails, as its source is gone
(`run_folder.settle`).
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, cast

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from ds_cmli.checkpoint import files
from ds_cmli.common.cli import leave
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import parse
from ds_cmli.config.validation import check_kind
from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults import preemption

NAME = "run.lock"
TOUCH_SECONDS = 15.0  # between two touches
TURN_SECONDS = 10.0  # in which another start has taken the lock
LOOK_SECONDS = 1.0  # between two looks whether the lock is still this process's
# Seconds in which a holder that may still run finds out that the lock has been taken over.
HANDOVER = 5.0
# seconds without a touch after which a holder on another machine counts as ended; NFS delays up to
# 60 s
LEASE = 180.0
# Environment variable that names the job where Slurm is not what starts it.
JOB = "DS_CMLI_JOB"

_held: list["Lock"] = []  # the locks of this process


def check(folder: Path) -> None:
    """End this process, with a line, if it had the lock on `folder` and another has it now.

    To be called before each write to a run's folder; for a file that is appended to, between
    opening it and writing.
    """
    for lock in _held:
        if lock.folder == folder:
            lock.end_if_lost()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A context in which rank 0 holds the lock on the run's folder for all ranks. Collective.

    Raises:
        UserError: on every rank, if another run holds the lock.
    """
    lock = Lock(folder)
    error = distributed.broadcast_object(
        lock.take() if distributed.is_main() else None
    )  # collective
    if error is not None:
        raise UserError(error)
    if distributed.is_main():
        preemption.before_leaving.append(lock.give_back)
    try:
        yield
    finally:
        if distributed.is_main():
            preemption.before_leaving.remove(lock.give_back)
            lock.give_back()


class Holder(TypedDict, total=False):
    """The content of a lock file, which may lack any of it if the file is foreign."""

    host: str
    pid: int
    since: str
    place: str  # the machine and container, see `_place`
    started: str | None  # when the process started, see `_started`
    job: list[str | None]  # a scheduler's job, and which of its starts this is
    token: str
    ended: bool  # it has left the lock for a holder before it


class Lock:
    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        self.mine: Holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "place": _place(),
            "started": _started(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self.mine["job"] = _job(self.mine["token"])
        self.ended = threading.Event()
        self.leaving = threading.Lock()
        self.left_for: Holder | None = None  # a holder before that may still run

    def take(self) -> str | None:
        """Take the lock. Returns None, or the error message if it cannot be taken."""
        before: Holder | None = None
        turn = self.path.with_name(f"{NAME}.turn")
        try:
            with FileLock(turn, timeout=TURN_SECONDS):
                refusal, before = self._take_over()
                turn.unlink(missing_ok=True)
        except Timeout:
            refusal = "another start is just taking it over from one gone"
        except OSError as error:
            refusal = f"cannot lock it: {error.strerror}"
        if refusal is not None:
            return f"--output-dir is {str(self.folder)!r}: {refusal}"
        threading.Thread(target=self._watch, daemon=True).start()
        _held.append(self)
        if before is not None and self._may_still_run(before):
            self.left_for = before
            if not before.get("ended"):
                time.sleep(HANDOVER)
        return None

    def _take_over(self) -> tuple[str | None, Holder | None]:
        """Make the lock, or replace one whose holder is gone: the reason if not, and the holder."""
        before = None
        while not self._make():
            content, age = self._read()
            if content is not None and self._lives(content, age):
                return self._line(content, age), None
            before = _parsed(content or "") or before
            if content is not None:
                beside = self.path.with_name(f"{NAME}.{self.mine['token']}")
                beside.write_text(json.dumps(self.mine))
                os.replace(beside, self.path)
            if self._read()[0] == json.dumps(self.mine):
                break
        return None, before

    def give_back(self) -> None:
        self.ended.set()
        if self in _held:
            _held.remove(self)
        with contextlib.suppress(OSError):
            if self._read()[0] != json.dumps(self.mine):
                return
            if self.left_for is None:
                self.path.unlink()
            else:
                files.publish(self.path, json.dumps({**self.mine, "ended": True}).encode())

    def end_if_lost(self) -> None:
        try:
            content = self.path.read_text(errors="replace")
        except OSError:  # removed, or not to be read now: nobody else is known to have it
            return
        if content and content != json.dumps(self.mine):
            self._leave(_parsed(content) or {})

    def _make(self) -> bool:
        try:
            with open(self.path, "x") as file:
                json.dump(self.mine, file)
        except FileExistsError:
            return False
        return True

    def _read(self) -> tuple[str | None, float]:
        """The content of the lock file, or None, and its age in seconds by the file server."""
        probe = self.path.with_name(f"{NAME}.{self.mine['token']}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        try:
            return self.path.read_text(errors="replace"), now - self.path.stat().st_mtime
        except FileNotFoundError:
            return None, 0.0

    def _lives(self, content: str, age: float) -> bool:
        holder = _parsed(content)
        if holder is not None and holder.get("ended"):
            return False
        job, start = (holder or {}).get("job") or (None, None)
        if job and [job, start] != self.mine["job"] and job == self.mine["job"][0]:
            return False  # an earlier start of this job, which was ended, or lost sight of
        if holder is not None and holder.get("place") == self.mine["place"]:
            return self._may_still_run(holder)
        return age < LEASE

    def _may_still_run(self, holder: Holder) -> bool:
        """Whether a holder runs, or could on another machine, or left the lock for such a one."""
        if holder.get("place") != self.mine["place"] or holder.get("ended"):
            return True
        return holder.get("started") == _started(holder.get("pid"))

    def _line(self, content: str, age: float) -> str:
        holder = _parsed(content)
        if holder is None:
            return f"its {NAME} cannot be read: another start is just making it, or remove it"
        line = (
            f"in use since {holder.get('since')} by process {holder.get('pid')} on "
            f"{holder.get('host')}: end that run, or give another --output-dir"
        )
        if holder.get("place") != self.mine["place"]:
            line += (
                f" (last sign of life {max(0.0, age):.0f} s ago; without one for {LEASE:.0f} s the "
                "folder is free)"
            )
        return line

    def _watch(self) -> None:
        touched = time.monotonic()
        while not self.ended.wait(LOOK_SECONDS):
            self.end_if_lost()
            # The folder was removed, and made again.
            if not (self.path.exists() or self.ended.is_set()):
                with contextlib.suppress(OSError):
                    self._make()
            if time.monotonic() - touched > TOUCH_SECONDS:
                touched = time.monotonic()
                with contextlib.suppress(OSError):
                    os.utime(self.path)

    def _leave(self, holder: Holder) -> NoReturn:
        with self.leaving:  # never released, because a process ends only once
            place = f"process {holder.get('pid')} on {holder.get('host')}"
            message = f"{self.path} was taken over by {place}: this start ends and writes no more"
            # Whoever read its output may be gone too.
            with contextlib.suppress(OSError, ValueError):
                print(f"error: {message}", file=sys.stderr, flush=True)
            leave(2)


def _job(token: str) -> list[str | None]:
    """The job that Slurm or another scheduler starts again under its name, and this start of it."""
    if name := os.environ.get(JOB):
        return [name, token]
    return [os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")]


def _parsed(content: str) -> Holder | None:
    """The holder that a lock file describes; None if the file is incomplete or damaged."""
    with contextlib.suppress(ValueError):
        holder = parse(content, dict)
        check_kind("it", holder, Holder)
        return cast(Holder, holder)
    return None


def _place() -> str:
    """Identifies the machine's boot and the container: there a process id is unambiguous."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return socket.gethostname()


def _started(pid: object) -> str | None:
    """The start time of a process, which tells it from a later one; None if it has ended."""
    # A damaged file may hold anything. A zombie counts as ended: it cannot write any more.
    process = preemption.status(pid) if isinstance(pid, int) else None
    return None if process is None else process[1][19]
