"""Ends the whole job when a rank is dead, hangs or fails, with one line that names the rank, its node and last step.

Every rank publishes its progress through the process group's store and reads that of the others. Since ranks train in
lockstep, a rank that hangs is recognised in two ways: it is not waiting in a collective, as the others are, and of all
ranks outside a collective it has made the least progress. Each reader measures by its own clock how long another rank
has been silent, because clocks differ between nodes.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from ds_cmli.distributed import process_group as distributed

EXIT_CODE = 1
SLOW = 10  # factor on the time limit while models are built, kernels are compiled or a checkpoint is written
COLLECTIVES = (
    "torch/distributed/",
    "deepspeed/comm/",
)  # a thread inside these files waits for other ranks


@dataclass
class Heartbeat:
    """What a rank publishes about itself."""

    node: str
    step: int = 0  # optimizer steps done
    count: int = 0  # calls of `heartbeat`
    slow: bool = True
    passed: int = (
        0  # slow parts of the run that end on all ranks together, and lie behind this rank
    )
    waiting: bool = False  # in a collective
    where: str = ""  # the line of code that its main thread executes
    alive: int = 0  # increases as long as the process runs, even if its main thread hangs
    failed: str = ""  # the exception that ended the training
    done: bool = False


def hold_back_nccl(timeout: float) -> None:
    """Delay NCCL's own error handling, so that the watchdog can first name the rank that is to blame.

    Before it aborts a process, NCCL's error handling sleeps four times as long as the first setting below says (torch
    2.8 and later). Only that one thread sleeps; the watchdog's threads go on and end the process before it wakes. To be
    called before the process group is made.

    Args:
        timeout: the watchdog's, in seconds.
    """
    if timeout:
        needed = (
            timeout + 4 * _interval(timeout) + 10
        )  # seconds until a dead rank is found and reported everywhere
        os.environ.setdefault(
            "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(int(max(60, needed) * 1000 / 4))
        )
        # A second thread of NCCL would take a longer sleep for a hang.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(max(480, 2 * needed))))


def _interval(timeout: float) -> float:
    return min(5.0, max(0.2, timeout / 20))  # seconds


class Watchdog:
    """`with Watchdog(120) as watchdog: ...; watchdog.heartbeat(step)` on every rank, while the process group is up.

    Args:
        timeout: seconds without a heartbeat after which a rank counts as hung, and without any sign of life as dead;
            0 turns the watchdog off.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.interval = _interval(timeout)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.mine = Heartbeat(os.environ.get("SLURMD_NODENAME") or platform.node())
        self.started = False
        self.heartbeats: list[Heartbeat | None] = [None] * self.world_size
        now = time.monotonic()
        self.progressed, self.lived = [now] * self.world_size, [now] * self.world_size
        self.passed, self.passed_at = 0, 0.0
        self.first_failure: float | None = None
        self.silence = 0.0  # seconds since the store, which rank 0 holds, has answered
        self.store_is_gone = self.reported = False
        self.main = threading.get_ident()
        self.closed, self.wake = threading.Event(), threading.Event()
        self.ending = threading.Lock()

    # --- for the training loop

    def heartbeat(self, step: int | None = None) -> None:
        """Report progress. At the beginning of a step, `step` is the number of optimizer steps done so far."""
        if step is not None:
            self.mine.step = step
            if self.mine.slow and self.started:  # the first step compiles kernels and fills caches
                self.mine.slow = False
                self.mine.passed += 1
            self.started = True
        self.mine.count += 1

    @contextmanager
    def slow(self, together: bool = False) -> Iterator[None]:
        """Around work without heartbeats that may exceed the time limit: the limit is ten times as long meanwhile.

        Args:
            together: all ranks do this, and its last collective ends it for all of them. A rank that stops before it
                could publish its end is then known to have done the work, and gets no more time for it.
        """
        before, self.mine.slow = self.mine.slow, True
        yield
        self.mine.slow = before
        self.mine.passed += together

    def dismiss(self) -> None:
        """Tell the other ranks to end silently, since this one has already printed why the job ends."""
        if self.timeout and self.world_size > 1:
            with suppress(RuntimeError):  # the store's process has ended
                self.store.set("reporter", str(self.rank))
                time.sleep(
                    2 * self.interval + 1
                )  # all ranks must read it before rank 0, which holds the store, ends

    def __enter__(self) -> "Watchdog":
        if self.timeout:
            # A connection of its own: a collective that waits on the process group's connection would block it.
            self.store = dist.PrefixStore(
                "watchdog", dist.distributed_c10d._get_default_store().clone()
            )  # type: ignore
            self.exchange = threading.Thread(target=self._exchange_loop, daemon=True)
            self.exchange.start()
            threading.Thread(target=self._silence_loop, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self.timeout:
            return
        if (
            error is None
            or isinstance(error, (SystemExit, KeyboardInterrupt))
            or self.world_size == 1
        ):
            self.mine.done = True  # a single rank prints its own error
        else:
            if _lost_a_rank(
                error
            ):  # another rank is to blame; if none is found, this rank's error is reported
                self._wait(4 * self.interval + 2, self._blame_the_missing)
                if self.store_is_gone:
                    self.exchange.join()  # that thread ends the job, unless rank 0 had finished
            self.mine.failed = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        # Rank 0 holds the store. If it ended before the others have published their end, they would take it for dead.
        self._wait(
            30, self._all_have_ended if self.rank == 0 else lambda: self._has_ended(self.rank)
        )
        if self.mine.failed:
            self._leave_later()
        self.closed.set()

    # --- in threads of their own

    def _exchange_loop(self) -> None:
        last = time.monotonic()
        while not self.closed.is_set():
            self.wake.wait(self.interval)
            self.wake.clear()
            try:
                self._exchange()
            except RuntimeError:  # the store's process has ended
                self.store_is_gone = True
                host = self.heartbeats[0]
                if not (self.mine.done or (host and host.done)):
                    self._end([0], f"failed: {host.failed}" if host and host.failed else "is dead")
                return
            self.silence = 0.0
            now = time.monotonic()
            stopped, last = now - last - self.interval, now
            if (
                stopped > self.interval
            ):  # this process itself was stopped, by Ctrl-Z or a suspended job
                self.lived = [min(now, t + stopped) for t in self.lived]
                self.progressed = [min(now, t + stopped) for t in self.progressed]
            if not (self.mine.done or self.mine.failed):
                self._judge(time.monotonic())

    def _silence_loop(self) -> None:
        """Notice a store that no longer answers: if its node has vanished, the other thread waits for it for ever."""
        while not self.closed.wait(self.interval):
            # Counted in intervals and not read from the clock, because this process itself may have been stopped.
            self.silence += self.interval
            if self.silence > self.timeout + 2 * self.interval:
                self.store_is_gone = True
                self._end([0], f"is dead: no answer for {self.timeout:g} s")

    def _exchange(self) -> None:
        """Publish this rank's heartbeat and read the others'."""
        self.mine.alive += 1
        self.mine.waiting, self.mine.where = _position(self.main)
        self.store.set(str(self.rank), json.dumps(asdict(self.mine)))
        if self.store.check(["reporter"]):
            if self.mine.failed:
                self.reported = True
                return
            self._leave()
        here = [
            r
            for r in range(self.world_size)
            if self.heartbeats[r] is not None or self.store.check([str(r)])
        ]
        now = time.monotonic()
        for r, text in zip(here, self.store.multi_get([str(r) for r in here]), strict=True):
            old, new = self.heartbeats[r], Heartbeat(**json.loads(text))
            if old is None or old.alive != new.alive:
                self.lived[r] = now
            if old is None or (old.count, old.slow) != (new.count, new.slow):
                self.progressed[r] = now
            self.heartbeats[r] = new

    def _judge(self, now: float) -> None:
        """End the job if a rank has failed, is dead or hangs."""
        passed = max((b.passed for b in self.heartbeats if b), default=0)
        if passed > self.passed:  # what the others have published about themselves may still be old
            self.passed, self.passed_at = passed, now
        slow = [b is None or (b.slow and b.passed >= passed) for b in self.heartbeats]
        limits = [self.timeout * (SLOW if each else 1) for each in slow]
        failed = [r for r, b in enumerate(self.heartbeats) if b and b.failed]
        if failed:
            # Two seconds in which this rank may end by itself: it may have met the same error or lost the connection.
            self.first_failure = self.first_failure or now
            if now - self.first_failure > 2:
                self._end(failed, f"failed: {self._heartbeat_of(failed[0]).failed}")
        running = [r for r in range(self.world_size) if not self._has_ended(r)]
        dead = [r for r in running if now - self.lived[r] > limits[r]]
        if dead:
            self._end(dead, f"is dead: no sign of life for {limits[dead[0]]:g} s")
        # On a GPU a rank that waits for others may look busy, as its CPU waits in a synchronisation of the GPU.
        busy = [r for r in running if not self._heartbeat_of(r).waiting]
        # Where all wait, the others may have waited long for the last one, which has just come.
        come = self.passed_at
        if not busy:
            come = max((self.progressed[r] for r in running), default=now)
        busy = busy or running
        least = min(self._heartbeat_of(r).count for r in busy)
        awaited = [r for r in busy if self._heartbeat_of(r).count == least]
        # One without any sign of life is dead, which shows a little later.
        alive = [r for r in awaited if now - self.lived[r] < 3 * self.interval]
        hung = [r for r in alive if now - max(come, self.progressed[r]) > limits[r]]
        if hung:
            self._end(
                hung,
                f"hangs: no progress for {limits[hung[0]]:g} s, in {self._heartbeat_of(hung[0]).where}",
            )

    def _blame_the_missing(self) -> bool:
        """End the job as soon as it is known which rank has been lost."""
        now = time.monotonic()
        others = [r for r in range(self.world_size) if r != self.rank]
        failed = [r for r in others if self._heartbeat_of(r).failed]
        if failed:
            self._end(failed, f"failed: {self._heartbeat_of(failed[0]).failed}")
        dead = [
            r for r in others if not self._has_ended(r) and now - self.lived[r] > 3 * self.interval
        ]
        if dead:
            self._end(dead, "is dead")
        return False

    def _heartbeat_of(self, rank: int) -> Heartbeat:
        return self.heartbeats[rank] or Heartbeat("?", count=-1, where="its start")

    def _has_ended(self, rank: int) -> bool:
        return self._heartbeat_of(rank).done or bool(self._heartbeat_of(rank).failed)

    def _all_have_ended(self) -> bool:
        if self.reported:
            time.sleep(2 * self.interval + 1)  # until all other ranks have read it
        return self.reported or all(map(self._has_ended, range(self.world_size)))

    # --- the end

    def _wait(self, seconds: float, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not condition() and not self.store_is_gone and time.monotonic() < end:
            self.wake.set()
            time.sleep(0.05)

    def _end(self, ranks: list[int], what: str) -> None:
        """Print on one rank what has happened, and end the process on every rank."""
        with self.ending:  # never released, because a process ends only once
            # Its last published step may be old. In lockstep it has done at least as many steps as this rank.
            step = max(self._heartbeat_of(ranks[0]).step, self.mine.step)
            name = ", ".join(f"{r} on node {self._heartbeat_of(r).node}" for r in ranks[:8]) + (
                ", ..." if ranks[8:] else ""
            )
            try:
                if self.store_is_gone:
                    raise RuntimeError
                first = (
                    self.store.compare_set("reporter", "", str(self.rank))
                    == str(self.rank).encode()
                )
            except RuntimeError:
                first = self.rank == min({*range(self.world_size)} - {*ranks}, default=self.rank)
            if first:
                with suppress(OSError):  # the terminal or pipe is closed
                    print(
                        f"error: rank {name} {what}; last step {step}: the job ends",
                        file=sys.stderr,
                        flush=True,
                    )
            self._leave()

    def _leave(self) -> None:
        # The others learn of the end from the store, which rank 0 holds, so rank 0 ends last. A launcher that sees one
        # rank end kills the others, which could cut off the printed line.
        time.sleep(2 * self.interval + 1 if self.rank == 0 else 0.5)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(EXIT_CODE)

    def _leave_later(self) -> None:
        """End a failed rank after `timeout` seconds in any case: its cleaning up may wait for the others for ever."""
        timer = threading.Timer(self.timeout, os._exit, [EXIT_CODE])
        timer.daemon = True
        timer.start()


def _lost_a_rank(error: BaseException) -> bool:
    """Whether torch.distributed raised this error because another rank is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and ("gloo" in text or "NCCL" in text or "Connection" in text)
    )


def _position(thread: int) -> tuple[bool, str]:
    """Whether a thread waits in a collective, and the innermost line of the project's code that it executes."""
    frame = sys._current_frames().get(thread)
    waiting, where = False, ""
    while frame:
        file = frame.f_code.co_filename
        waiting = waiting or any(part in file for part in COLLECTIVES)
        if not where and "/lib/python" not in file and not file.startswith("<"):
            where = f"{os.path.basename(file)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return waiting, where or "a library"
