"""Ends the job when a rank makes no progress; one line names the rank, its node, code and step.

Every rank publishes its state in the process group's store. Rank 0 reads the states of all ranks
and publishes a verdict, which the others read. Per interval P ranks write P values and read 2 P.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import NamedTuple

import click
import torch.distributed as dist

from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed import this_node
from ds_cmli.errors import lost_connection, one_line
from ds_cmli.faults.diagnosis import (
    GRACE,
    Fault,
    RankRecord,
    RankState,
    diagnose,
    max_silence,
    rank_line,
)

# A thread inside these files waits for other ranks.
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
PACKAGE = f"{Path(__file__).parent.parent}/"
# Files of Python and of its packages, and names such as <string>, which are no files.
LIBRARY = re.compile("/lib(64)?/python|^<")
VERDICT = "verdict"  # the key of what rank 0 publishes for all
_numbers = count()  # each watchdog of this process has keys of its own


class Verdict(NamedTuple):
    """Rank 0's decision, published for all ranks."""

    turn: int = -1  # number of the publication
    deputy: int = 1  # the rank that prints if rank 0 is silent: the first one of another node
    exit_code: int = 0  # with which all ranks end; 0: they go on
    root_state: Sequence = ()  # of rank 0


class Watchdog:
    """Watches all ranks: `with Watchdog(120) as watchdog: ...; watchdog.heartbeat(step)`.

    It is entered by the main thread of every rank, in a process group.

    Args:
        timeout: seconds without progress after which the job ends; 0 turns the watchdog off.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.interval = min(2.0, max(0.2, timeout / 20))  # seconds between two publications
        self.rank = distributed.rank()
        self.num_ranks = distributed.world_size()
        self.main_thread = threading.get_ident()
        self.name = f"watchdog/{next(_numbers)}"
        self.end_lock = threading.Lock()  # taken, for good, by the thread that ends the process
        # Written by the main thread.
        self.closed = threading.Event()
        self.step: int | None = None  # optimizer steps done
        self.heartbeats = 0
        self.is_slow = True
        self.read_progress: Callable[[], object] | None = None
        self.lost_at = ""  # the line at which a connection to another rank has broken
        self.error = ""  # this rank's own, which ends it
        self.exit_code = 0
        # Written by the thread of `_exchange`.
        self.last_read: object = None
        self.num_changes = 0  # of what `read_progress` returns
        self.turn = 0  # number of publications
        self.verdict = Verdict()
        self.is_store_lost = False

    def heartbeat(self, step: int | None = None) -> None:
        """Report progress. `step`, given when a step begins: the number of steps done before."""
        if step is not None:
            self.is_slow = self.step is None  # the first step compiles kernels and fills caches
            self.step = step
        self.heartbeats += 1

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Multiply the time limit by `SLOW_FACTOR` inside, for work without heartbeats."""
        was_slow = self.is_slow
        self.is_slow = True
        yield
        self.is_slow = was_slow  # after an error the rank stays slow

    @contextmanager
    def counting(self, read_progress: Callable[[], object]) -> Iterator[None]:
        """Inside, each change of the result, such as a number of bytes, counts as progress."""
        self.read_progress = read_progress
        try:
            yield
        finally:
            self.read_progress = None

    def __enter__(self) -> "Watchdog":
        targets = (self._exchange, self._watch) if self.timeout else ()
        self.threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        """Publish this rank's error; after a lost connection, wait until the cause is printed."""
        if self.timeout and self.num_ranks > 1 and error is not None:
            if lost_connection(error):
                if threading.current_thread() is threading.main_thread():
                    # A launcher ends the other ranks as soon as one has ended.
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                *_, (innermost, _) = walk_tb(error.__traceback__)
                _, self.lost_at = _position(innermost)
                self.closed.wait(2 * self.timeout + GRACE)
            elif isinstance(error, Exception):
                self.exit_code = 2 if isinstance(error, click.ClickException) else 1
                self.error = f"{type(error).__name__}: {one_line(error)}"
                self.closed.set()
                exchanging, _ = self.threads
                exchanging.join(2.0)  # it publishes the error
        self.closed.set()

    def _state(self) -> RankState:
        """Return the state to publish; count a change of `read_progress` since the last call."""
        read_progress = self.read_progress
        if read_progress is not None:
            progress = read_progress()
            self.num_changes += progress != self.last_read
            self.last_read = progress
        waits, place = _position(sys._current_frames().get(self.main_thread))
        return RankState(
            node=this_node(),
            step=self.step or 0,
            heartbeats=self.heartbeats,
            collectives=distributed.num_collectives(),
            num_changes=self.num_changes,
            is_slow=self.is_slow,
            waits=waits or bool(self.lost_at),
            place=self.lost_at or place,
            has_lost=bool(self.lost_at),
            error=self.error,
            exit_code=self.exit_code,
        )

    def _exchange(self) -> None:
        """Publish this rank's state. Rank 0 then judges all states; the others read its verdict."""
        # A connection of its own: a collective that waits on the group's one would block it.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store = dist.PrefixStore(self.name, store)
        records = [RankRecord() for _ in range(self.num_ranks)]
        try:
            is_closed = False
            while not is_closed:
                is_closed = self.closed.wait(self.interval)
                if is_closed and not self.error:
                    return
                store.set(str(self.rank), json.dumps([self.turn, *self._state()]))
                if self.rank == 0:
                    self._judge(store, records)
                elif store.check([VERDICT]):
                    self.verdict = Verdict(*json.loads(store.get(VERDICT)))
                self.turn += 1
        except RuntimeError:  # rank 0, which holds the store, has ended
            self.is_store_lost = True

    def _judge(self, store: dist.Store, records: list[RankRecord]) -> None:
        """Read the states of all ranks, and publish whether the job ends; on rank 0."""
        # A rank that has never published has no key, for which `multi_get` would wait.
        started = [r for r, x in enumerate(records) if x.turn >= 0 or store.check([str(r)])]
        publications = store.multi_get([str(rank) for rank in started])
        published = dict(zip(started, publications, strict=True))
        for rank, record in enumerate(records):
            # Without a publication: turn -1, and the defaults of RankState.
            turn, *values = json.loads(published.get(rank, b"[-1]"))
            record.update(turn, RankState(*values), self.interval)
        deputy = next((r for r in started if records[r].state.node != this_node()), 1)
        fault = diagnose(records, self.timeout)
        exit_code = 0 if fault is None else fault.exit_code
        self.verdict = Verdict(self.turn, deputy, exit_code, records[0].state)
        store.set(VERDICT, json.dumps(self.verdict))
        if fault is not None:
            self._end(fault)

    def _watch(self) -> None:
        """End the process by the verdict, or when rank 0 or the store does not answer."""
        root_record = RankRecord()
        last_turn = -1
        # Seconds are counted in turns, because the whole job may have been suspended.
        seconds_unanswered = 0.0  # by the store
        while not self.closed.wait(self.interval):
            verdict = self.verdict
            if verdict.exit_code and self.rank > 0:
                self._end(Fault("", verdict.exit_code))
            root_record.update(verdict.turn, RankState(*verdict.root_state), self.interval)
            is_unanswered = self.turn == last_turn
            seconds_unanswered = seconds_unanswered + self.interval if is_unanswered else 0.0
            last_turn = self.turn
            reason = self._loss_of_root(seconds_unanswered, root_record.seconds_silent)
            if reason:
                # A rank 0 without other ranks is its own deputy.
                is_deputy = self.rank == min(verdict.deputy, self.num_ranks - 1)
                self._end(Fault(rank_line(0, root_record.state, reason) if is_deputy else ""))

    def _loss_of_root(self, seconds_unanswered: float, seconds_silent: float) -> str:
        """Return why rank 0 does not answer this rank, "" if it does.

        Args:
            seconds_unanswered: since the store's last answer to this rank.
            seconds_silent: since rank 0's last verdict.
        """
        limit = max_silence(self.timeout, bool(self.lost_at))
        if self.is_store_lost and self.lost_at:
            return "its process has ended"
        # No verdict is read from a store that does not answer: blame the store first.
        if seconds_unanswered > limit or (seconds_unanswered and seconds_silent > limit):
            return "its store does not answer"
        if seconds_silent > limit and self.rank > 0:
            return f"no progress for {limit:g} s, dead or stopped"
        return ""

    def _end(self, fault: Fault) -> None:
        """Print the line of a fault, and end the process."""
        self.end_lock.acquire()
        if fault.line:
            with suppress(OSError):  # the terminal or pipe is closed
                print(f"error: {fault.line}", file=sys.stderr, flush=True)
        # Wait until the others have read the verdict: rank 0 holds the store, and a launcher that
        # sees a rank end kills the one that prints.
        time.sleep(1.0 + 3 * self.interval)
        os._exit(fault.exit_code)


def _position(frame: FrameType | None) -> tuple[bool, str]:
    """Return whether a thread is in a collective, and its innermost line outside of libraries.

    Lines of this package count even if it is installed among the libraries.
    """
    waits = False
    place = ""
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or any(part in file for part in COLLECTIVES)
        if not place and (file.startswith(PACKAGE) or LIBRARY.search(file) is None):
            place = f"{os.path.basename(file)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return waits, place or "a library"
