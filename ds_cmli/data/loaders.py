"""Loaders whose processes fail in one line: killed, without shared memory, or without open files.

A process passes its batches on through shared memory (/dev/shm) and open files. PyTorch prints a
traceback where that fails, drops the batch, and the training waits for it.
"""

import gc
import multiprocessing.queues
import os
import resource
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset

from ds_cmli.common.errors import UserError, too_many_files
from ds_cmli.data.load import Data
from ds_cmli.data.sampler import GlobalBatchSampler

WorkerInit = Callable[[int], None]  # called in each loading process, with its number

SHARED = "/dev/shm"
# What PyTorch and the system say where shared memory is short.
SHORT = (
    "shared memory object",
    "unable to write to file </torch",
    "shared memory(shm)",
    "Bus error",
)
# What the system says, and multiprocessing where a file that is handed over cannot be opened.
MANY_FILES = ("Too many open files", "items of ancdata")
OPEN_FILES = 65536  # to which the limit of open files is raised, as far as this process may


def train_loader(
    data: Data,
    sampler: GlobalBatchSampler,
    workers: int,
    worker_init: WorkerInit | None = None,
    prefetch: int = 2,
) -> DataLoader:
    """An endless loader of this rank's `Batch`es, from the sampler's consumed position on.

    Each of the `workers` loading processes prepares `prefetch` batches ahead. With a GPU, batches
    are in pinned memory.
    """
    return Loader(
        data.train,
        collate_fn=data.collate,
        num_workers=workers,
        batch_sampler=sampler,
        seed=sampler.seed,
        worker_init_fn=worker_init,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers else None,
    )


def batches(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    collate: Callable,
    worker_init: WorkerInit | None = None,
) -> DataLoader:
    """A loader that reads a data set once, in its order."""
    return Loader(
        dataset,
        collate_fn=collate,
        num_workers=min(workers, -(-len(dataset) // batch_size)),  # type: ignore[arg-type]
        batch_size=batch_size,
        worker_init_fn=worker_init,
    )


class Loader(DataLoader):
    """A `DataLoader` that raises `UserError` for what its processes report.

    That is their own `UserError`s, their end, and a lack of shared memory or open files.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int = 0,
        worker_init_fn: WorkerInit | None = None,
        **options: Any,  # of `DataLoader`
    ):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        super().__init__(
            dataset,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: torch would draw the processes' seeds from that which the
            # model's dropout uses.
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=partial(_begin, self.writer, worker_init_fn),
            **options,
        )
        weakref.finalize(self, _close, self.reader, self.writer)

    def __iter__(self) -> Iterator:  # type: ignore[override]
        batches = None
        try:
            if self.num_workers:
                _allow_open_files()
            batches = super().__iter__()
            if self.num_workers and threading.current_thread() is threading.main_thread():
                # PyTorch's handler would raise at any place of the training, in the midst of a
                # collective too. The end of a process is found at the next batch.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches
        except UserError as error:  # raised in a process: its traceback precedes its message
            message = str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]
            raise UserError(message) from None
        except (OSError, RuntimeError, EOFError) as error:  # EOFError: a process ended as it wrote
            line = self._message(error, getattr(batches, "_workers", ()))
            if line is None:
                raise
            raise UserError(line) from None

    def _message(self, error: Exception, processes: Sequence[BaseProcess]) -> str | None:
        """The line for an error of the processes or of what they share; None for another error."""
        text = ""
        with suppress(OSError):  # no process has written why it ended
            text = os.read(self.reader, 1000).decode(errors="replace")
        text = text or str(error)
        if any(part in text for part in MANY_FILES):
            line = too_many_files(f" for --workers {self.num_workers}")
            return f"{line}, or give fewer --workers"
        if any(part in text for part in SHORT):
            return _no_shared_memory(self.num_workers)
        for process in processes:
            process.join(0.1)  # so that its exit code is known
        dead = next((process for process in processes if process.exitcode), None)
        if dead is None:
            return None
        code = dead.exitcode or 0
        if code == -signal.SIGBUS:
            return _no_shared_memory(self.num_workers)
        how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        return (
            f"a data loading process (pid {dead.pid}) has ended, {how}: start again to go on; "
            "where the system kills it for want of memory, with fewer --workers"
        )


def _close(*files: int) -> None:
    for file in files:
        with suppress(OSError):
            os.close(file)


def _no_shared_memory(workers: int) -> str:
    try:
        usage = shutil.disk_usage(SHARED)
        room = f"has {usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB free"
    except OSError:
        room = "cannot be read"
    return (
        f"no shared memory for batches of --workers {workers}: {SHARED} {room}: enlarge it "
        "(docker run --shm-size=8g), or give --workers 0"
    )


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _begin(writer: int, init: WorkerInit | None, worker: int) -> None:
    """Begin a loading process: a batch that cannot be passed on ends it, and the training too.

    The batch is passed on in two threads, one that describes it and one that hands over its files.
    An error there would otherwise be printed, and the batch dropped; the second would try again,
    and print, without end.
    """

    def end(error: BaseException, batch: object) -> NoReturn:
        os.write(writer, str(error)[:1000].encode())
        os._exit(1)

    # The garbage collector would write to all objects that the training has made, and copy-on-write
    # would copy some 100 MB into this process. Frozen objects are skipped.
    gc.freeze()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore
    sys.excepthook = lambda kind, error, trace: end(error, None)  # multiprocessing.resource_sharer
    if init is not None:
        init(worker)
