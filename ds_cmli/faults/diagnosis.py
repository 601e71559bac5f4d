"""Finds the rank at fault among ranks that train in lockstep, from what each of them publishes.

A rank at fault ends, falls silent, or makes no progress outside of a collective. The others wait
for it: inside a collective or, on GPUs, in a CPU-GPU sync behind a collective that it has not
entered.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

EXIT_CODE = 86  # of ranks that end because another one holds them up
# Factor on the time limit while models are built, kernels compiled or a checkpoint written.
SLOW = 10
MAX_SILENCE = 60.0  # seconds without a publication, after which a rank is dead or stopped
MAX_SILENCE_AFTER_LOSS = 6.0  # the same, if another rank has lost a connection
# Seconds in which the others may meet the error that has ended a rank, and end by themselves.
GRACE = 15.0


class RankState(NamedTuple):
    """What a rank publishes of itself."""

    node: str
    step: int  # optimizer steps done
    heartbeats: int
    collectives: int  # entered so far, in all process groups
    is_slow: bool  # it builds models, compiles kernels or writes a checkpoint
    waits: bool  # inside a collective
    place: str  # the innermost line of the project's code
    has_lost: bool  # its connection to another rank has broken
    error: str  # its own, which ends it; "": none
    exit_code: int  # of that error

    @property
    def progress(self) -> tuple[int, int]:
        return self.heartbeats, self.collectives


@dataclass
class RankRecord:
    """The last publication of a rank, and for how long it has not changed."""

    state: RankState | None = None  # None: none yet
    turn: int = -1  # number of the publication
    silent: float = 0.0  # seconds since the last publication
    still: float = 0.0  # seconds without progress
    ended: float = 0.0  # seconds since its own error

    def update(self, turn: int, state: RankState | None, seconds: float) -> None:
        """Take what is published now, `seconds` after the last update."""
        self.silent = 0.0 if turn != self.turn else self.silent + seconds
        if state is not None:
            # The line changes in an endless loop, too.
            unmoved = self.state is not None and self.state._replace(place=state.place) == state
            self.still = self.still + seconds if unmoved else 0.0
            self.ended = self.ended + seconds if state.error else 0.0
        self.turn = turn
        self.state = state


class Fault(NamedTuple):
    """Why the job ends."""

    line: str  # "": the rank at fault prints its own
    exit_code: int


def diagnose(records: Sequence[RankRecord], timeout: float) -> Fault | None:
    """Return the fault that holds the ranks up; None if they get on, or may still do so.

    Args:
        records: of all ranks, in their order.
        timeout: seconds without progress after which a rank is at fault.
    """
    has_lost = any(record.state is not None and record.state.has_lost for record in records)
    for rank, record in enumerate(records):
        if record.state is not None and record.state.error and (has_lost or record.ended > GRACE):
            is_printed = record.state.exit_code == 2  # a mistake, by the rank itself
            line = rank_line(rank, record.state, f"has ended by {record.state.error}")
            return Fault("" if is_printed else line, record.state.exit_code)
        limit = max_silence(timeout, has_lost)
        if record.state is not None and record.state.is_slow and not has_lost:
            limit *= SLOW  # a library that writes a large file may block the other threads
        if record.silent > limit:
            what = f"no progress for {limit:g} s, dead or stopped"
            return Fault(rank_line(rank, record.state, what), EXIT_CODE)

    states = [record.state for record in records if record.state is not None]
    if len(states) < len(records):
        return None
    suspects = _suspects(states)
    # A rank that gets on alone, as in an evaluation, may keep the others waiting.
    busy = {*suspects, *(rank for rank, state in enumerate(states) if not state.waits)}
    limit = timeout * (SLOW if any(states[rank].is_slow for rank in busy) else 1)
    if min(records[rank].still for rank in busy) <= limit:
        return None
    what = f"no progress for {limit:g} s, at "
    if len(suspects) == len(states) > 1:
        first_at: dict[str, int] = {}
        for rank, state in enumerate(states):
            first_at.setdefault(state.place, rank)
        places = " and ".join(f"{place} (rank {rank})" for place, rank in first_at.items())
        return Fault(f"all ranks: {what}{places}; last step {states[0].step}", EXIT_CODE)
    suspect = states[suspects[0]]
    what += suspect.place
    if len(suspects) > 1:
        what += f", with {len(suspects) - 1} more ranks"
    if suspect.waits:
        num_at = Counter(states[rank].place for rank in range(len(states)) if rank not in suspects)
        what += f", while others are at {num_at.most_common(1)[0][0]}"
    return Fault(rank_line(suspects[0], suspect, what), EXIT_CODE)


def max_silence(timeout: float, has_lost: bool) -> float:
    """Return the seconds without a publication after which a rank is dead or stopped."""
    return min(timeout / 2, MAX_SILENCE_AFTER_LOSS) if has_lost else min(timeout, MAX_SILENCE)


def rank_line(rank: int, state: RankState | None, what: str) -> str:
    """Return the sentence about a rank, which has published nothing if `state` is None."""
    node = "?" if state is None else state.node
    step = 0 if state is None else state.step
    return f"rank {rank} on node {node}: {what}; last step {step}"


def _suspects(states: Sequence[RankState]) -> list[int]:
    """Return the ranks that hold the others up; all ranks if they cannot be told apart.

    These are the ranks that are furthest behind: a rank in a CPU-GPU sync seems to compute, but it
    has entered a collective that they have not. Of several, the fewest at one line are at fault,
    then those that compute. There are two exceptions. If all ranks wait in collectives, one of them
    has missed a collective and has gone on to another one. If those behind all wait, and no
    more than half of the ranks compute, these hold them up.
    """
    ranks = range(len(states))
    computing = [rank for rank in ranks if not states[rank].waits]
    furthest = min if computing else max
    extreme = furthest(state.progress for state in states)
    suspects = [rank for rank in ranks if states[rank].progress == extreme]
    if 0 < len(computing) <= len(states) / 2 and {*suspects}.isdisjoint(computing):
        suspects = computing
    num_at = Counter(states[rank].place for rank in suspects)
    fewest = min(num_at.values())
    suspects = [rank for rank in suspects if num_at[states[rank].place] == fewest]
    return [rank for rank in suspects if rank in computing] or suspects
