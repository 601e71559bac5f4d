"""The state of CUDA's allocator at the first event of a recorded history.

A recording can begin anywhere: it was switched on late, or its ring buffer has dropped the first
events. What was live at its first event is found by starting from the segments at the end and
undoing the events one by one. Only one thing cannot be found in this way. Where free memory follows
a block of the large pool, up to 1 MiB of it may belong to the block, as a remainder that was too
small to be split off. Later events can show it: the next allocation behind the block begins where
the block ends. With expandable segments there are no such remainders.
"""

import re
from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from itertools import pairwise

from ds_cmli.allocator.blocks import DEFAULT_POOL, MIN_BLOCK, SMALL_REQUEST, SMALL_SEGMENT, Settings
from ds_cmli.allocator.ranges import find_ranges
from ds_cmli.allocator.state import (
    Entry,
    Mapped,
    Record,
    Snapshot,
    State,
    entries,
    joined,
    range_with,
)
from ds_cmli.common.errors import UserError

LIVE = ("active_allocated", "active_pending_free", "active_awaiting_free")
ACTIONS = {
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "snapshot",
    "oom",
    "user_defined",
}


def beginning(snapshot: Snapshot, device: int) -> State:
    """The allocator's state before the first event of the history of `device`.

    Raises:
        UserError: the model's rules do not cover the history, or it contradicts itself.
    """
    state = State(settings=_settings(snapshot, device))
    for segment in snapshot["segments"]:
        if segment.get("device", 0) == device:
            _add_segment(state, segment)
    for first, second in pairwise(sorted(state.segments)):
        if first + state.segments[first].size > second:
            raise UserError(f"device {device} has segments that overlap: the snapshot is damaged")
    trace = entries(snapshot["device_traces"][device])
    wrong = find_ranges(state, trace) if state.settings.expandable_segments else None
    for number, entry in reversed(list(enumerate(trace))):
        if number == wrong or not _undo(state, number, entry):
            raise UserError(
                f"device {device}: event {number} ({entry.action} of {entry.size:,} B at "
                f"{entry.address:#x}) contradicts what came after: the snapshot's segments and its "
                "history do not belong together"
            )
    if state.settings.expandable_segments:
        for address in state.segments:
            if range_with(state.ranges, address) is None:
                raise UserError(
                    f"device {device}: the memory at {address:#x} was never mapped: the history is "
                    "damaged"
                )
    _bound_remainders(state, trace, device)
    return state


def _add_segment(state: State, segment: Record) -> None:
    """Add a segment of the snapshot, with its live blocks."""
    address, size = segment["address"], segment["total_size"]
    pool = tuple(segment.get("segment_pool_id") or DEFAULT_POOL)
    small = size == SMALL_SEGMENT
    if "segment_type" in segment:
        small = segment["segment_type"] == "small"
    state.segments[address] = Mapped(size, segment["stream"], small, pool)
    for block in segment["blocks"]:
        if block["state"] in LIVE:
            state.live[address] = block.get("requested_size") or block["size"]
            state.sizes[address] = block["size"]
        address += block["size"]


def _undo(state: State, number: int, entry: Entry) -> bool:
    """Undo one event in `state`. Returns False if the event cannot have led to this state."""
    action, address, size = entry.action, entry.address, entry.size
    if action == "alloc" and size:
        state.sizes.pop(address, None)
        return state.live.pop(address, None) is not None
    if action == "free_completed" and size:
        free = address not in state.live
        state.live[address] = size
        return free
    if action == "segment_alloc":
        part = state.segments.pop(address, None)
        if part is None or part.size != size:
            return False
        if entry.pool is not None:
            part = replace(part, pool=entry.pool, released=None)
        state.taken[number] = part
    if action == "segment_free":
        free = not _inside(state.segments, address, size)
        part = Mapped(size, entry.stream, size == SMALL_SEGMENT, entry.pool or DEFAULT_POOL)
        if entry.pool is None:
            part = replace(part, released=number)
            state.assumed_pools[number] = DEFAULT_POOL
        state.segments[address] = part
        return free
    if action == "segment_map":
        return _cut_out(state.segments, address, size)
    if action == "segment_unmap":
        free = not _inside(state.segments, address, size)
        pool, small, stream = state.range_at[number].key
        state.segments[address] = Mapped(size, stream, small, pool)
        return free
    return True


def _inside(mapped: dict[int, Mapped], address: int, size: int) -> list[int]:
    """The entries of `mapped` that [address, address + size) touches."""
    end = address + size
    return sorted(at for at, part in mapped.items() if at < end and at + part.size > address)


def _cut_out(mapped: dict[int, Mapped], address: int, size: int) -> bool:
    """Remove [address, address + size) from `mapped`, whose entries it may cut.

    Returns False, and removes nothing, if not all of it is mapped.
    """
    end = address + size
    inside = _inside(mapped, address, size)
    covered = sum(min(end, start + mapped[start].size) - max(address, start) for start in inside)
    if covered != size:
        return False
    for start in inside:
        part = mapped.pop(start)
        if start < address:
            mapped[start] = replace(part, size=address - start)
        if start + part.size > end:
            mapped[end] = replace(part, size=start + part.size - end)
    return True


def _settings(snapshot: Snapshot, device: int) -> Settings:
    """The settings that the history was recorded with.

    Raises `UserError` if the model does not implement them.
    """
    actions = {event["action"] for event in snapshot["device_traces"][device]}
    if actions - ACTIONS:
        raise UserError(
            f"device {device} has events {sorted(actions - ACTIONS)!r}, which the replay does not "
            "know"
        )
    recorded = snapshot.get("allocator_settings")
    if not isinstance(recorded, dict):
        recorded = {}
    divisions = _divisions(recorded, device)
    _check_sizes(recorded, device)
    most = recorded.get("max_split_size", -1)
    if type(most) is not int or not 0 < most < 2**63:
        most = None
    return Settings(
        max_split_size=most,
        roundup_power2_divisions=divisions,
        expandable_segments=_expandable(snapshot, device, actions),
    )


def _divisions(recorded: Record, device: int) -> int:
    divisions = recorded.get("roundup_power2_divisions")
    given = list(divisions.values()) if isinstance(divisions, dict) else [divisions]
    numbers = [number or 0 for number in given] or [0]
    for n in numbers:
        if not (type(n) is int and n >= 0 and n & (n - 1) == 0 and n == numbers[0]):
            raise UserError(
                f"device {device} was recorded with roundup_power2_divisions {divisions!r}, of "
                "which the replay knows one power of two for all sizes"
            )
    return numbers[0]


def _check_sizes(recorded: Record, device: int) -> None:
    conf = recorded.get("PYTORCH_CUDA_ALLOC_CONF") or recorded.get("PYTORCH_ALLOC_CONF") or ""
    sizes = r"(large_segment_size_mb|max_non_split_rounding_mb)\s*:\s*(\w+)"
    for name, size in re.findall(sizes, str(conf)):
        if size != "20":
            raise UserError(
                f"device {device} was recorded with {name}:{size}, of which the replay knows only "
                "20"
            )


def _expandable(snapshot: Snapshot, device: int, actions: set[str]) -> bool:
    kinds = set()
    for segment in snapshot["segments"]:
        if segment.get("device", 0) == device:
            kinds.add(bool(segment.get("is_expandable")))
    if actions & {"segment_map", "segment_unmap"}:
        kinds.add(True)
    if actions & {"segment_alloc", "segment_free"}:
        kinds.add(False)
    if len(kinds) > 1:
        raise UserError(
            f"device {device} was recorded with expandable segments and ordinary ones, which "
            "the replay does not follow: which of them a request may take is not known"
        )
    return kinds == {True}


@dataclass(frozen=True)
class Gap:
    """Free memory behind a block, part of which may belong to it."""

    begin: int  # where the block ends without its remainder
    end: int  # of the segment
    most: int  # bytes that the remainder can have


def _bound_remainders(state: State, trace: list[Entry], device: int) -> None:
    """Fill `state.remainders`, from the gap behind each block and the first allocation in it."""
    order = sorted(state.live)
    gaps: dict[int, Gap] = {}  # by the address of the block in front
    ends = sorted((address + part.size, address) for address, part in joined(state).items())
    for address, following in pairwise([*order, 1 << 64]):
        at = bisect_left(ends, (address + 1, 0))
        if at == len(ends) or address < ends[at][1]:
            raise UserError(
                f"device {device}: the block at {address:#x} lies in no segment: the history is "
                "incomplete"
            )
        end, segment = ends[at]
        size = state.rounded(state.live[address])
        gap = Gap(address + size, end, min(following, end) - address - size)
        if gap.most < 0:
            raise UserError(
                f"device {device}: the block at {address:#x} reaches into the next: the history is "
                "damaged"
            )
        least, most = _remainder(state, address, gap.most, state.segments[segment].small)
        state.remainders[address] = least, most
        if least < most:
            gaps[address] = replace(gap, most=most)
    for entry in trace:
        if entry.action == "alloc" and entry.size:
            position = bisect_left(order, entry.address)
            before = order[position - 1] if position else -1
            if before in gaps and entry.address < gaps[before].end:
                gap = gaps.pop(before)
                remainder = entry.address - gap.begin
                if 0 <= remainder <= gap.most:
                    state.remainders[before] = remainder, remainder
            insort(order, entry.address)
        elif entry.action == "free_completed" and entry.size:
            position = bisect_left(order, entry.address)
            if position < len(order) and order[position] == entry.address:
                order.pop(position)
            gaps.pop(entry.address, None)


def _remainder(state: State, address: int, gap: int, small: bool) -> tuple[int, int]:
    """The least and the most bytes of the remainder of a live block, before `gap` unused bytes."""
    size = state.rounded(state.live[address])
    if address in state.sizes:
        known = state.sizes[address] - size
        return known, known
    if state.settings.expandable_segments or small:
        return 0, 0
    most_split = state.settings.max_split_size
    never_split = most_split is not None and size >= most_split
    if gap <= SMALL_REQUEST or never_split:
        return gap, gap
    # The gap ends with a free block, which in the large pool has more than 1 MiB.
    return 0, min(SMALL_REQUEST, gap - SMALL_REQUEST - MIN_BLOCK)
