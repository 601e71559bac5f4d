"""Ends the job when a rank makes no progress; one line names the rank, its node, code and step.

Every rank publishes its state through the process group's store and reads that of the others. Since
ranks train in lockstep, the one to blame does not wait in a collective, as the others do.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed import this_node

# Factor on the time limit while models are built, kernels compiled or a checkpoint written.
SLOW = 10
# A thread inside these files waits for other ranks.
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


class Watchdog:
    """Watches all ranks: `with Watchdog(120) as watchdog: ...; watchdog.heartbeat(step)`.

    It is entered by the main thread of every rank, in a process group.

    Args:
        timeout: seconds without progress after which the job ends; 0 turns the watchdog off.
    """

    def __init__(self, timeout: float):
        self.timeout, self.interval = timeout, min(5.0, max(0.2, timeout / 20))  # seconds
        self.rank, self.main = distributed.rank(), threading.get_ident()
        self.step: int | None = None  # optimizer steps done
        self.count, self.is_slow = 0, True
        self.turn, self.closed = 0, threading.Event()
        # What each rank has published.
        self.states: list[dict] = [{"slow": True} for _ in range(distributed.world_size())]

    def heartbeat(self, step: int | None = None) -> None:
        """Report progress; `step`, at the beginning of a step: how many are done so far."""
        if step is not None:
            self.is_slow = self.step is None  # the first step compiles kernels and fills caches
            self.step = step
        self.count += 1

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Multiply the time limit by `SLOW` inside, for work without heartbeats."""
        before, self.is_slow = self.is_slow, True
        yield
        self.is_slow = before

    def __enter__(self) -> "Watchdog":
        for target in (self._exchange, self._watch) if self.timeout else ():
            threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()

    def _exchange(self) -> None:
        """Publish this rank's state, and read those of all once each rank has published its own."""
        # A connection of its own: a collective that waits on the group's one would block it.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store = dist.PrefixStore("watchdog", store)
        keys = [str(rank) for rank in range(len(self.states))]
        with suppress(RuntimeError):  # rank 0, which holds the store, has ended
            while not self.closed.wait(self.interval):
                waiting, where = _position(self.main)
                mine = {"node": this_node(), "step": self.step or 0, "count": self.count}
                mine |= {"slow": self.is_slow, "waiting": waiting, "where": where}
                store.set(keys[self.rank], json.dumps(mine | {"turn": self.turn}))
                if store.check(keys):
                    self.states = [json.loads(text) for text in store.multi_get(keys)]
                self.turn += 1

    def _watch(self) -> None:
        """End the job when a rank, or the store, has made no progress for too long."""
        ranks, before = range(len(self.states)), self.states
        # Seconds since each rank has made progress, since it has published anything, and since the
        # store has answered: counted in turns, as the whole job may have been suspended.
        still, silent, unanswered, turn = [0.0 for _ in ranks], [0.0 for _ in ranks], 0.0, 0
        while not self.closed.wait(self.interval):
            states = self.states
            if turn == self.turn:
                unanswered += self.interval
                if unanswered > self.timeout:
                    self._end(0, "its store does not answer")
                continue
            turn, unanswered = self.turn, 0.0
            for r in ranks:
                changed = {name for name, x in states[r].items() if x != before[r].get(name)}
                silent[r] = 0.0 if changed else silent[r] + self.interval
                still[r] = 0.0 if changed - {"turn", "where"} else still[r] + self.interval
            before = states
            dead = [r for r in ranks if silent[r] > self.timeout / 2]
            # Ranks that compute while others wait; of several the one with the fewest heartbeats.
            busy = dead or [r for r in ranks if not states[r].get("waiting")] or ranks
            blamed = min(busy, key=lambda r: states[r].get("count", 0))
            limit = self.timeout * (SLOW if states[blamed]["slow"] else 1)
            if still[blamed] > limit:
                where = "dead or stopped" if dead else f"at {states[blamed]['where']}"
                self._end(blamed, f"no progress for {limit:g} s, {where}")

    def _end(self, rank: int, what: str) -> None:
        """Print on one rank what has happened, and end the process."""
        if self.rank == (1 if rank == 0 and len(self.states) > 1 else 0):
            node, step = (self.states[rank].get(name, "?") for name in ("node", "step"))
            line = f"error: rank {rank} on node {node}: {what}; last step {step}"
            with suppress(OSError):  # the terminal or pipe is closed
                print(line, file=sys.stderr, flush=True)
        # Until the others have found out as well: rank 0 holds the store, and a launcher that sees
        # a rank end kills the one that prints.
        time.sleep(1.0 + 3 * self.interval)
        os._exit(1)


def _position(thread: int) -> tuple[bool, str]:
    """Whether a thread waits in a collective, and its innermost line of the project's code."""
    frame, waiting, where = sys._current_frames().get(thread), False, "a library"
    while frame:
        file = frame.f_code.co_filename
        waiting = waiting or any(part in file for part in COLLECTIVES)
        if where == "a library" and "/lib/python" not in file and not file.startswith("<"):
            where = f"{os.path.basename(file)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return waiting, where
