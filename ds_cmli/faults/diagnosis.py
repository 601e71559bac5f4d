"""Finds the rank at fault among ranks that train in lockstep, from what each of them publishes.

The others wait for it: inside a collective or, on GPUs, in a CPU-GPU sync behind a collective that
it has not entered.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

FAULT_EXIT_CODE = 86  # of ranks that end because another one holds them up
# Factor on the time limit while models are built, kernels compiled or a checkpoint written.
SLOW = 10
MAX_SILENCE = 60.0  # seconds without a publication, after which a rank is dead or stopped
MAX_SILENCE_AFTER_LOSS = 6.0  # the same, if another rank has lost a connection
# Seconds in which the others may meet the error that has ended a rank, and end by themselves.
GRACE = 15.0


class RankState(NamedTuple):
    """The state that a rank publishes."""

    node: str
    step: int  # optimizer steps done
    heartbeats: int
    collectives: int  # entered so far, in all process groups
    num_changes: int  # of fetched bytes and the like, which are other on each rank
    is_slow: bool  # it builds models, compiles kernels or writes a checkpoint
    waits: bool  # inside a collective
    place: str  # the innermost line of the project's code
    has_lost: bool  # its connection to another rank has broken
    error: str  # its own, which ends it; "": none
    exit_code: int  # of that error


@dataclass
class RankRecord:
    """The last publication of a rank, and for how long it has not changed."""

    state: RankState | None = None  # before the first publication: None
    turn: int = -1  # number of the publication
    seconds_silent: float = 0.0  # since the last publication
    seconds_without_progress: float = 0.0

    def update(self, turn: int, state: RankState | None, seconds: float) -> None:
        """Take what is published now, `seconds` after the last update."""
        self.seconds_silent = 0.0 if turn != self.turn else self.seconds_silent + seconds
        if state is not None:
            # The line changes in an endless loop, too.
            stays = self.state is not None and self.state._replace(place=state.place) == state
            self.seconds_without_progress = self.seconds_without_progress + seconds if stays else 0
        self.turn = turn
        self.state = state


class Fault(NamedTuple):
    """The reason why the job ends."""

    line: str  # "": the rank at fault prints its own
    exit_code: int


def diagnose(records: Sequence[RankRecord], timeout: float) -> Fault | None:
    """Return the fault that holds the ranks up; None if they get on, or may still do so.

    Args:
        records: of all ranks, in their order.
        timeout: seconds without progress after which a rank is at fault.
    """
    states = [record.state for record in records if record.state is not None]
    has_lost = any(state.has_lost for state in states)
    for rank, record in enumerate(records):
        state = record.state
        has_waited = has_lost or record.seconds_without_progress > GRACE
        if state is not None and state.error and has_waited:
            is_printed = state.exit_code == 2  # a mistake, by the rank itself
            line = rank_line(rank, state, f"has ended by {state.error}")
            return Fault("" if is_printed else line, state.exit_code)
        limit = max_silence(timeout, has_lost)
        if state is not None and state.is_slow and not has_lost:
            limit *= SLOW  # a library that writes a large file may block the other threads
        if record.seconds_silent > limit:
            reason = f"no progress for {limit:g} s, dead or stopped"
            return Fault(rank_line(rank, state, reason), FAULT_EXIT_CODE)
    if len(states) < len(records):
        return None
    suspects = _suspects(states)
    # A rank that gets on alone, as in an evaluation, may keep the others waiting.
    awaited = {*suspects, *(rank for rank, state in enumerate(states) if not state.waits)}
    limit = timeout * (SLOW if any(states[rank].is_slow for rank in awaited) else 1)
    if min(records[rank].seconds_without_progress for rank in awaited) <= limit:
        return None
    suspect = states[suspects[0]]
    reason = f"no progress for {limit:g} s, at {suspect.place}"
    if len(suspects) == len(states) > 1:
        return Fault(f"all ranks: {reason}; last step {suspect.step}", FAULT_EXIT_CODE)
    if suspect.waits:
        num_at = Counter(state.place for state in states if state.place != suspect.place)
        reason += "".join(f", while others are at {place}" for place, _ in num_at.most_common(1))
    return Fault(rank_line(suspects[0], suspect, reason), FAULT_EXIT_CODE)


def max_silence(timeout: float, has_lost: bool) -> float:
    """Return the seconds without a publication after which a rank is dead or stopped."""
    return min(timeout / 2, MAX_SILENCE_AFTER_LOSS) if has_lost else min(timeout, MAX_SILENCE)


def rank_line(rank: int, state: RankState | None, reason: str) -> str:
    """Return the sentence about a rank, which has published nothing if `state` is None."""
    node = "?" if state is None else state.node
    return f"rank {rank} on node {node}: {reason}; last step {state.step if state else 0}"


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
    num_at = Counter(states[rank].place for rank in suspects)  # rule 4
    fewest = min(num_at.values())
    suspects = [rank for rank in suspects if num_at[states[rank].place] == fewest]
    return [rank for rank in suspects if rank in computing] or suspects
