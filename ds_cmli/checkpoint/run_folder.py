"""A run's folder: made once, held by one run, and set back to the step that a run goes on from."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from ds_cmli.checkpoint import save
from ds_cmli.checkpoint.resume import ResumePoint, root_of
from ds_cmli.checkpoint.save import FOLDER
from ds_cmli.checkpoint.state import TrainState
from ds_cmli.commands import print_line
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed import this_node
from ds_cmli.errors import UserError, blame
from ds_cmli.files import sha256
from ds_cmli.models.hf import BEST
from ds_cmli.provenance import revision, versions

METRICS, CONFIG, LOCK = "metrics.jsonl", "run.json", "run.lock"
TOUCH_SECONDS = 15.0  # between two touches of the lock
LEASE = 180.0  # seconds without a touch after which a holder elsewhere has ended; NFS delays by 60
JOB = "DS_CMLI_JOB"  # variable that names the job where another scheduler than Slurm restarts it


@contextmanager
def written_together(folder: Path) -> Iterator[None]:
    """All ranks raise a `UserError` if rank 0 cannot write inside. Collective."""
    place = f"--output-dir is {str(folder)!r}: cannot write there"
    with distributed.raised_together(), blame(place):  # collective
        yield


@contextmanager
def made(config: Config, resume: str) -> Iterator[Path]:
    """The run's folder; a new one is removed at the end if it is empty. Collective."""
    named = config.run.output_dir
    if not named and resume not in ("auto", "never"):  # that of the run in `--resume PATH`
        named = str(root_of(resume).parent)
    base = folder = Path(named or f"runs/{config.run.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    new = list[Path]()
    with written_together(base):  # collective
        if distributed.is_main():
            number = 1
            while not named and folder.exists():  # of another start in this second
                number += 1
                folder = base.with_name(f"{base.name}.{number}")
            new += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
    try:
        yield distributed.broadcast_object(folder)  # collective
    finally:
        with suppress(OSError):
            for path in new:
                path.rmdir()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, rank 0 holds the folder's lock for all ranks. Collective.

    A file made by an exclusive open, which is atomic on NFS too, and touched again and again: a
    holder that has died here, or does not touch it any more elsewhere, has lost it, and so has an
    earlier start of the same job. Raises `UserError` on every rank if another run holds it.
    """
    path, own, ended = folder / LOCK, "", threading.Event()

    def touch() -> None:
        while not ended.wait(TOUCH_SECONDS):
            with suppress(OSError):
                os.utime(path)

    with written_together(folder):  # collective
        if distributed.is_main():
            own = _take(path)
            threading.Thread(target=touch, daemon=True).start()
    try:
        with distributed.raised_together():  # collective
            if not path.exists():
                unseen = f"{this_node()} does not see what rank 0 writes there"
                raise UserError(f"--output-dir is {str(folder)!r}: {unseen}: give a shared folder")
        yield
    finally:
        ended.set()
        with suppress(OSError):
            if own and path.read_text() == own:  # a start that took this one for ended may have it
                path.unlink()


def _take(path: Path) -> str:
    """Make the lock file, and return its text. Raises `UserError` if another run holds it."""
    started = psutil.Process().create_time()
    job = [os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")]
    if os.environ.get(JOB):
        job = [os.environ[JOB], f"{os.getpid()} {started}"]
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "job": job}
    while True:
        with suppress(FileExistsError), open(path, "x") as file:
            file.write(json.dumps(mine))
            return json.dumps(mine)
        with suppress(FileNotFoundError):  # given back since
            if not path.stat().st_size:
                time.sleep(0.5)  # it is being written, or the disk was full
            age, holder = time.time() - path.stat().st_mtime, None
            with suppress(ValueError, KeyError, TypeError):  # it was not written whole
                content = json.loads(path.read_text())
                holder = content if _runs(content, mine, age) else None
            if holder is not None:
                raise UserError(
                    f"--output-dir is {str(path.parent)!r}: in use by process {holder['pid']} on "
                    f"{holder['host']}, which gave a sign {age:.0f} s ago: give another"
                )
            path.unlink()


def _runs(holder: dict[str, Any], mine: dict[str, Any], age: float) -> bool:
    (job, start), (own_job, own_start) = holder["job"], mine["job"]
    if job is not None and job == own_job and start != own_start:
        return False  # an earlier start of the same job, which its scheduler has ended
    if holder["host"] != mine["host"]:
        return age < LEASE
    try:
        process = psutil.Process(holder["pid"])
        dead = process.status() == psutil.STATUS_ZOMBIE  # nobody has waited for it yet
        return not dead and abs(process.create_time() - holder["started"]) < 1
    except psutil.Error:
        return False


def settle(
    point: ResumePoint | None,
    folder: Path,
    config: Config,
    ds_config: DeepSpeedConfig,
    describe: Callable[[Path], None],
) -> None:
    """Remove the records of steps after that at which the run goes on. Collective.

    `describe` writes what a model's folder has beside its weights.
    """
    with written_together(folder):  # collective
        if not distributed.is_main():
            return
        save.remove_incomplete(folder)
        state = TrainState() if point is None else point.state
        if point is not None and point.is_of(folder):
            save.publish(folder / FOLDER / save.LATEST, point.path.name.encode())
        _cut_back(folder / METRICS, state.step, state.evaluated)
        kept = folder / BEST
        if kept.is_file() and sha256(kept) != state.best.get("sha256"):
            print_line(f"{kept} is not the best of this run: removed")
            kept.unlink()
        describe(folder)
        content: dict[str, Any] = {"config": config.to_dict(), "deepspeed": dict(ds_config)}
        content |= {"versions": versions(), "revision": revision(), "command": sys.argv}
        save.publish(folder / CONFIG, (json.dumps(content, indent=2) + "\n").encode())


def _cut_back(path: Path, step: int, evaluated: bool) -> None:
    """Keep the lines up to `step`; without that step's evaluation if it is still to be done."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):  # a line that was cut off
            values = json.loads(line)
            again = not evaluated and any(name.startswith("eval/") for name in values)
            if values["step"] < step + (not again) and line.endswith(b"\n"):
                kept.append(line)
    save.publish(path, b"".join(kept))
