"""Ends the whole job when a rank is dead, hangs or fails.

One line names the rank, its node and its last step.

Every rank publishes its progress through the process group's store and reads that of the others.
Since ranks train in lockstep, a rank that hangs is recognised in two ways: it is not waiting in a
collective, as the others are, and of all ranks outside a collective it has made the least progress.
Each reader measures by its own clock how long another rank is silent, as nodes' clocks differ.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from ds_cmli.distributed.launchers import this_node
from ds_cmli.faults import preemption

EXIT_CODE = 1
# Factor on the time limit while models are built, kernels compiled or a checkpoint written.
SLOW = 10
# A thread inside these files waits for other ranks.
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


@dataclass
class Heartbeat:
    """What a rank publishes about itself."""

    node: str
    step: int = 0  # optimizer steps done
    count: int = 0  # calls of `heartbeat`
    slow: bool = True
    passed: int = 0  # slow parts that end on all ranks together, and lie behind this rank
    waiting: bool = False  # in a collective
    where: str = ""  # the line of code that its main thread executes
    alive: int = 0  # increases as long as the process runs, even if its main thread hangs
    failed: str = ""  # the exception that ended the training
    done: bool = False

    @property
    def ended(self) -> bool:
        return self.done or bool(self.failed)


def hold_back_nccl(timeout: float) -> None:
    """Delay NCCL's own error handling, so that the watchdog first names the rank to blame.

    Before it aborts a process, NCCL's error handling sleeps four times as long as the first setting
    below says (torch 2.8 and later). Only that one thread sleeps; the watchdog's threads go on and
    end the process before it wakes. To be called before the process group is made.

    Args:
        timeout: the watchdog's, in seconds.
    """
    if not timeout:
        return
    # Seconds until a dead rank is found and reported everywhere.
    needed = timeout + 4 * _interval(timeout) + 10
    sleep_ms = int(max(60, needed) * 1000 / 4)
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(sleep_ms))
    # A second thread of NCCL would take a longer sleep for a hang.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(max(480, 2 * needed))))


def _interval(timeout: float) -> float:
    return min(5.0, max(0.2, timeout / 20))  # seconds


class Watchdog:
    """Watches all ranks: `with Watchdog(120, store) as watchdog: ...; watchdog.heartbeat(step)`.

    It is entered on every rank once they have met.

    Args:
        timeout: seconds without a heartbeat after which a rank counts as hung, and without any sign
            of life as dead; 0 turns the watchdog off.
        store: that of the ranks.
    """

    def __init__(self, timeout: float, store: dist.Store):
        self.timeout = timeout
        self.interval = _interval(timeout)
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store = store
        self.mine = Heartbeat(this_node())
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
        self.timer = threading.Timer(timeout, os._exit, [EXIT_CODE])
        self.timer.daemon = True

    # --- for the training loop

    def heartbeat(self, step: int | None = None) -> None:
        """Report progress; `step`, at the beginning of a step: how many are done so far."""
        if step is not None:
            self.mine.step = step
            if self.started and self.mine.slow:  # the first step compiles kernels and fills caches
                self.mine.slow = False
                self.mine.passed += 1
            self.started = True
        self.mine.count += 1

    @contextmanager
    def slow(self, together: bool = False) -> Iterator[None]:
        """Multiply the time limit by `SLOW` inside, for work without heartbeats that may exceed it.

        Args:
            together: all ranks do this, and its last collective ends it for all of them. A rank
                that stops before it could publish its end is then known to have done the work, and
                gets no more time for it.
        """
        before, self.mine.slow = self.mine.slow, True
        yield
        self.mine.slow = before
        self.mine.passed += together

    def dismiss(self) -> None:
        """Tell the other ranks to end silently: this one has printed why the job ends."""
        if self.timeout and self.world_size > 1:
            with suppress(RuntimeError):  # the store's process has ended
                self.store.set("reporter", str(self.rank))
                self._let_others_read()

    def __enter__(self) -> "Watchdog":
        if self.timeout:
            # A connection of its own: a collective that waits on the process group's connection
            # would block it.
            store = self.store.clone()  # type: ignore[attr-defined]
            self.store = dist.PrefixStore("watchdog", store)
            self.exchange = threading.Thread(target=self._exchange_loop, daemon=True)
            self.exchange.start()
            threading.Thread(target=self._silence_loop, daemon=True).start()
            preemption.before_leaving.append(self._leave_together)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.timeout:
            return
        if error is not None:  # of a rank that was signalled before the first step, it may be
            preemption.end_start()
        intended = error is None or isinstance(error, (SystemExit, KeyboardInterrupt))
        if intended or self.world_size == 1:  # a single rank prints its own error
            self.mine.done = True
        else:
            # Another rank may be to blame; if none is found, this rank's error is reported.
            if _lost_a_rank(error):
                self._wait(4 * self.interval + 2, self._blame_the_missing)
                if self.store_is_gone:
                    self.exchange.join()  # that thread ends the job, unless rank 0 had finished
            self.mine.failed = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        # Rank 0 holds the store. If it ended before the others have published their end, they would
        # take it for dead.
        self._wait(30, self._all_have_ended if self.rank == 0 else self._i_have_ended)
        if self.mine.failed:  # ends in any case: its cleaning up may wait for others for ever
            self.timer.start()
        self.closed.set()
        self.wake.set()
        self.exchange.join(1.0)  # it reads the store, which ends with the run
        preemption.before_leaving.remove(self._leave_together)

    def cleaned_up(self) -> None:
        """The process, which has ended its group since, may go on."""
        self.timer.cancel()

    # --- in threads of their own

    def _exchange_loop(self) -> None:
        last = time.monotonic()
        while not self.closed.is_set():
            self.wake.wait(self.interval)
            self.wake.clear()
            if self.closed.is_set():
                return
            try:
                self._exchange()
            except RuntimeError:  # the store's process, or its run, has ended
                self.store_is_gone = True
                host = self.heartbeats[0]
                both_failed = self.mine.failed and host and host.failed
                if not (self.mine.done or both_failed or (host and host.done)):
                    self._end([0], f"failed: {host.failed}" if host and host.failed else "is dead")
                return
            self.silence = 0.0
            now = time.monotonic()
            stopped, last = now - last - self.interval, now
            # This process itself may have been stopped, by Ctrl-Z or a suspended job.
            if stopped > self.interval:
                self.lived = [min(now, t + stopped) for t in self.lived]
                self.progressed = [min(now, t + stopped) for t in self.progressed]
            if not self.mine.ended:
                self._judge(time.monotonic())

    def _silence_loop(self) -> None:
        """Notice a store that no longer answers.

        If its node has vanished, the other thread waits for it for ever.
        """
        while not self.closed.wait(self.interval):
            # Counted in intervals and not read from the clock, because this process itself may have
            # been stopped.
            self.silence += self.interval
            if self.silence > self.timeout + 2 * self.interval:
                self.store_is_gone = True
                self._end([0], f"is dead: no answer for {self.timeout:g} s")

    def _exchange(self) -> None:
        """Publish this rank's heartbeat and read the others'."""
        self.mine.alive += 1
        self.mine.waiting, self.mine.where = _position(self.main)
        self.store.set(str(self.rank), json.dumps(asdict(self.mine)))
        if self.store.check(["signalled"]) and not preemption.requested():
            preemption.ask("a signal to another rank", seconds=0)
        if self.store.check(["reporter"]):
            if self.mine.failed:
                self.reported = True
                return
            self._leave()
        messages = []
        for r, known in enumerate(self.heartbeats):
            if known is not None or self.store.check([str(r)]):
                messages.append(r)
        now = time.monotonic()
        for r, text in zip(messages, self.store.multi_get(list(map(str, messages))), strict=True):
            old, new = self.heartbeats[r], Heartbeat(**json.loads(text))
            if old is None or old.alive != new.alive:
                self.lived[r] = now
            if old is None or (old.count, old.slow) != (new.count, new.slow):
                self.progressed[r] = now
            self.heartbeats[r] = new

    def _judge(self, now: float) -> None:
        """End the job if a rank has failed, is dead or hangs."""
        limits = self._limits(now)
        failed = [r for r, beat in enumerate(self.heartbeats) if beat and beat.failed]
        if failed:
            # Two seconds in which this rank may end by itself: it may have met the same error or
            # lost the connection.
            self.first_failure = self.first_failure or now
            if now - self.first_failure > 2:
                self._end(failed, f"failed: {self._heartbeat_of(failed[0]).failed}")
        running = [r for r in range(self.world_size) if not self._heartbeat_of(r).ended]
        dead = [r for r in running if now - self.lived[r] > limits[r]]
        if dead:
            self._end(dead, f"is dead: no sign of life for {limits[dead[0]]:g} s")
        # On a GPU a rank that waits for others may look busy, as its CPU waits in a synchronisation
        # of the GPU.
        busy = [r for r in running if not self._heartbeat_of(r).waiting]
        come = self.passed_at
        if not busy:
            # All wait: the others may have waited long for the last one, which has just come.
            come = max((self.progressed[r] for r in running), default=now)
            busy = running
        least = min(self._heartbeat_of(r).count for r in busy)
        hung = []
        for r in busy:
            # One without any sign of life is dead, which shows a little later.
            alive = now - self.lived[r] < 3 * self.interval
            late = now - max(come, self.progressed[r]) > limits[r]
            if alive and late and self._heartbeat_of(r).count == least:
                hung.append(r)
        if hung:
            where = self._heartbeat_of(hung[0]).where
            self._end(hung, f"hangs: no progress for {limits[hung[0]]:g} s, in {where}")

    def _limits(self, now: float) -> list[float]:
        """The time limit of each rank, in seconds."""
        passed = max((beat.passed for beat in self.heartbeats if beat), default=0)
        if passed > self.passed:  # what the others have published about themselves may still be old
            self.passed, self.passed_at = passed, now
        limits = []
        for beat in self.heartbeats:
            slow = beat is None or (beat.slow and beat.passed >= passed)
            limits.append(self.timeout * SLOW if slow else self.timeout)
        return limits

    def _blame_the_missing(self) -> bool:
        """End the job as soon as it is known which rank has been lost."""
        now = time.monotonic()
        others = [r for r in range(self.world_size) if r != self.rank]
        failed = [r for r in others if self._heartbeat_of(r).failed]
        if failed:
            self._end(failed, f"failed: {self._heartbeat_of(failed[0]).failed}")
        running = [r for r in others if not self._heartbeat_of(r).ended]
        dead = [r for r in running if now - self.lived[r] > 3 * self.interval]
        if dead:
            self._end(dead, "is dead")
        return False

    def _heartbeat_of(self, rank: int) -> Heartbeat:
        return self.heartbeats[rank] or Heartbeat("?", count=-1, where="its start")

    def _i_have_ended(self) -> bool:
        """Whether this rank has read its own end from the store."""
        return self._heartbeat_of(self.rank).ended

    def _all_have_ended(self) -> bool:
        if self.reported:
            self._let_others_read()
        return self.reported or all(beat is not None and beat.ended for beat in self.heartbeats)

    def _let_others_read(self) -> None:
        """Wait until all other ranks have read the store, before rank 0, which holds it, ends."""
        time.sleep(2 * self.interval + 1)

    # --- the end

    def _leave_together(self) -> None:
        """Let all ranks end by a signal to this one before the first step."""
        with suppress(RuntimeError):  # the store's process has ended
            self.store.add("signalled", 1)
            end = time.monotonic() + 2 * self.interval
            while self.store.add("signalled", 0) < self.world_size and time.monotonic() < end:
                time.sleep(0.05)

    def _wait(self, seconds: float, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not condition() and not self.store_is_gone and time.monotonic() < end:
            self.wake.set()
            time.sleep(0.05)

    def _end(self, ranks: list[int], what: str) -> None:
        """Print on one rank what has happened, and end the process on every rank."""
        with self.ending:  # never released, because a process ends only once
            # Its last published step may be old. In lockstep it has done at least as many steps as
            # this rank.
            step = max(self._heartbeat_of(ranks[0]).step, self.mine.step)
            names = [f"{r} on node {self._heartbeat_of(r).node}" for r in ranks[:8]]
            if ranks[8:]:
                names.append("...")
            if self._is_first(ranks):
                line = f"error: rank {', '.join(names)} {what}; last step {step}: all ranks end"
                with suppress(OSError):  # the terminal or pipe is closed
                    print(line, file=sys.stderr, flush=True)
            self._leave()

    def _is_first(self, blamed: list[int]) -> bool:
        """Whether this rank prints for all."""
        me = str(self.rank)
        if not self.store_is_gone:
            with suppress(RuntimeError):  # the store's process has ended
                return self.store.compare_set("reporter", "", me) == me.encode()
        return self.rank == min({*range(self.world_size)} - {*blamed}, default=self.rank)

    def _leave(self) -> None:
        # The others learn of the end from the store, which rank 0 holds, so rank 0 ends last. A
        # launcher that sees one rank end kills the others, which could cut off the printed line.
        if self.rank == 0:
            self._let_others_read()
        else:
            time.sleep(0.5)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(EXIT_CODE)


def _lost_a_rank(error: BaseException | None) -> bool:
    """Whether torch.distributed raised this error because another rank is gone."""
    words = ("gloo", "NCCL", "Connection")
    named = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return named or isinstance(error, dist.DistError)


def _position(thread: int) -> tuple[bool, str]:
    """Whether a thread waits in a collective, and its innermost line of the project's code."""
    frame = sys._current_frames().get(thread)
    waiting, where = False, ""
    while frame:
        file = frame.f_code.co_filename
        waiting = waiting or any(part in file for part in COLLECTIVES)
        if not where and "/lib/python" not in file and not file.startswith("<"):
            where = f"{os.path.basename(file)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return waiting, where or "a library"
