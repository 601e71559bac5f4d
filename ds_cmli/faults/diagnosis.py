"""Finds the rank at fault among ranks that train in lockstep, from what each of them publishes.

The others wait for it: inside a collective or, on GPUs, in a CPU-GPU sync behind a collective that
it has not entered.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mode
from typing import NamedTuple

FAULT_EXIT_CODE = 86  # of ranks that end because another one holds them up
# Multiplies a time limit while models are built, kernels compiled or a checkpoint written.
SLOW_FACTOR = 10
MAX_SILENCE = 60.0  # seconds without a publication, after which a rank is dead or stopped
MAX_SILENCE_AFTER_LOSS = 6.0  # the same, if another rank has lost a connection
# Seconds after the error of one rank in which the others may fail and end by themselves.
GRACE = 15.0


class RankState(NamedTuple):
    """The state that a rank publishes; the defaults stand for a rank that has published nothing."""

    node: str = "?"
    step: int = 0  # optimizer steps done
    heartbeats: int = 0
    collectives: int = 0  # entered so far, in all process groups
    num_changes: int = 0  # of `Watchdog.counting`; a sign of progress, not compared among ranks
    is_slow: bool = False  # it builds models, compiles kernels or writes a checkpoint
    waits: bool = False  # inside a collective
    place: str = ""  # the innermost line of the project's code
    has_lost: bool = False  # its connection to another rank has broken
    error: str = ""  # the rank's own error, which ends it; "": none
    exit_code: int = 0  # of `error`


@dataclass
class RankRecord:
    """The last publication of a rank, and for how long it has not changed."""

    state: RankState = field(default_factory=RankState)
    turn: int = -1  # number of the publication; before the first one: -1
    seconds_silent: float = 0.0  # since the last publication
    seconds_without_progress: float = 0.0

    def update(self, turn: int, state: RankState, seconds: float) -> None:
        """Take what is published now, `seconds` after the last update."""
        self.seconds_silent = 0.0 if turn != self.turn else self.seconds_silent + seconds
        # The place is no progress, because it also changes in an endless loop.
        has_progress = self.state._replace(place=state.place) != state
        self.seconds_without_progress = (
            0.0 if has_progress else self.seconds_without_progress + seconds
        )
        self.turn = turn
        self.state = state


class Fault(NamedTuple):
    """The reason why the job ends."""

    line: str  # "": the rank at fault prints its own
    exit_code: int = FAULT_EXIT_CODE


def diagnose(records: Sequence[RankRecord], timeout: float) -> Fault | None:
    """Return the fault that holds the ranks up; None if they get on, or may still do so.

    Args:
        records: of all ranks, in their order.
        timeout: seconds without progress after which a rank is at fault.
    """
    has_lost = any(record.state.has_lost for record in records)
    for rank, record in enumerate(records):
        fault = _end_of_rank(rank, record, timeout, has_lost)
        if fault is not None:
            return fault
    if any(record.turn < 0 for record in records):
        return None  # a rank that still starts is not compared with the others
    return _hold_up(records, timeout)


def _end_of_rank(rank: int, record: RankRecord, timeout: float, has_lost: bool) -> Fault | None:
    """Return the fault of a rank that has ended or is silent; `has_lost`: any rank's field."""
    state = record.state
    if state.error and (has_lost or record.seconds_without_progress > GRACE):
        is_printed = state.exit_code == 2  # the rank itself prints a mistake of the user
        line = rank_line(rank, state, f"has ended by {state.error}")
        return Fault("" if is_printed else line, state.exit_code)
    limit = max_silence(timeout, has_lost)
    if state.is_slow and not has_lost:
        # A library that writes a large file may block the thread that publishes.
        limit *= SLOW_FACTOR
    if record.seconds_silent > limit:
        return Fault(rank_line(rank, state, f"no progress for {limit:g} s, dead or stopped"))
    return None


def _hold_up(records: Sequence[RankRecord], timeout: float) -> Fault | None:
    """Return the fault of ranks that run, but for which the others wait."""
    states = [record.state for record in records]
    suspects = _suspects(states)
    # The others may have to wait for any rank that computes, for instance for a long evaluation:
    # there is no fault while one of these makes progress.
    awaited = {*suspects, *(rank for rank, state in enumerate(states) if not state.waits)}
    limit = timeout * (SLOW_FACTOR if any(states[rank].is_slow for rank in awaited) else 1)
    if min(records[rank].seconds_without_progress for rank in awaited) <= limit:
        return None
    suspect = states[suspects[0]]
    reason = f"no progress for {limit:g} s, at {suspect.place}"
    if len(suspects) == len(states) > 1:
        return Fault(f"all ranks: {reason}; last step {suspect.step}")
    if suspect.waits:
        other_places = [state.place for state in states if state.place != suspect.place]
        if other_places:
            reason += f", while others are at {mode(other_places)}"
    return Fault(rank_line(suspects[0], suspect, reason))


def max_silence(timeout: float, has_lost: bool) -> float:
    """Return the seconds without a publication after which a rank is dead or stopped."""
    return min(timeout / 2, MAX_SILENCE_AFTER_LOSS) if has_lost else min(timeout, MAX_SILENCE)


def rank_line(rank: int, state: RankState, reason: str) -> str:
    """Return the sentence about a rank."""
    return f"rank {rank} on node {state.node}: {reason}; last step {state.step}"


def _suspects(states: Sequence[RankState]) -> list[int]:
    """Return the ranks that hold the others up; all ranks if they cannot be told apart.

    1. The ranks that are furthest behind: a rank in a CPU-GPU sync seems to compute, but it has
       entered a collective that they have not.
    2. If all ranks wait in collectives, those furthest ahead: they have missed a collective.
    3. If those behind all wait, and at most half of the ranks compute, those that compute.
    4. Among several, those at the line where the fewest ranks are, and of these those that compute.
    """
    ranks = range(len(states))
    computing = [rank for rank in ranks if not states[rank].waits]
    furthest = min if computing else max  # rules 1 and 2
    progress = [(state.heartbeats, state.collectives) for state in states]
    suspects = [rank for rank in ranks if progress[rank] == furthest(progress)]
    if 0 < len(computing) <= len(states) / 2 and {*suspects}.isdisjoint(computing):  # 3
        suspects = computing
    num_ranks_at = Counter(states[rank].place for rank in suspects)  # rule 4
    fewest = min(num_ranks_at.values())
    suspects = [rank for rank in suspects if num_ranks_at[states[rank].place] == fewest]
    return [rank for rank in suspects if rank in computing] or suspects
