"""The state of CUDA's allocator at the first event of a recorded history.

A recording can begin anywhere: it was switched on late, or its ring buffer has dropped the first events. What was live
at its first event is found by starting from the segments at the end and undoing the events one by one. Only one thing
cannot be found in this way. Where free memory follows a block of the large pool, up to 1 MiB of it may belong to the
block, as a remainder that was too small to be split off (here: its "rest"). Later events can tell: the next allocation
behind the block begins where the block ends. With expandable segments there are no such rests.
"""

import re
from bisect import bisect_left, insort
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ds_cmli.allocator.blocks import DEFAULT_POOL, MIN_BLOCK, SMALL_REQUEST, SMALL_SEGMENT, Settings
from ds_cmli.allocator.ranges import find_ranges
from ds_cmli.allocator.state import Mapped, State, joined, recorded_pool
from ds_cmli.common.errors import UserError

LIVE = ("active_allocated", "active_pending_free", "active_awaiting_free")
ACTIONS = ("alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap",
           "snapshot", "oom", "user_defined")  # fmt: skip


def beginning(snapshot: dict[str, Any], device: int) -> State:
    """The allocator's state before the first event of the history of `device`.

    Raises:
        UserError: the model's rules do not cover the history, or it contradicts itself.
    """
    trace = snapshot["device_traces"][device]
    out = State(settings=_settings(snapshot, device))
    for segment in snapshot["segments"]:
        if segment.get("device", 0) != device:
            continue
        address, pool = segment["address"], tuple(segment.get("segment_pool_id") or DEFAULT_POOL)
        small = (
            segment.get(
                "segment_type", "small" if segment["total_size"] == SMALL_SEGMENT else "large"
            )
            == "small"
        )
        out.segments[address] = Mapped(segment["total_size"], segment["stream"], small, pool)
        for block in segment["blocks"]:
            if block["state"] in LIVE:
                out.live[address] = block.get("requested_size") or block["size"]
                out.sizes[address] = block["size"]
            address += block["size"]
    order = sorted(out.segments)
    if any(first + out.segments[first].size > second for first, second in pairwise(order)):
        raise UserError(f"device {device} has segments that overlap: the snapshot is damaged")
    wrong = find_ranges(out, trace) if out.settings.expandable_segments else None
    for number in range(len(trace) - 1, -1, -1):
        if number == wrong or not _undo(out, number, trace[number]):
            action, address, size = (
                trace[number].get(key, 0) for key in ("action", "addr", "size")
            )
            raise UserError(
                f"device {device}: event {number} ({action} of {size:,} B at {address:#x}) contradicts what came after:"
                " the snapshot's segments and its history do not belong together"
            )
    for address in out.segments if out.settings.expandable_segments else ():
        if not any(found.begin <= address < found.end for found in out.ranges):
            raise UserError(
                f"device {device}: the memory at {address:#x} was never mapped: the history is damaged"
            )
    _bound_rests(out, trace, device)
    return out


def _undo(state: State, number: int, entry: dict[str, Any]) -> bool:
    """Undo one event in `state`. Returns False if the event cannot have led to this state."""
    action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
    if action == "alloc" and size:
        state.sizes.pop(address, None)
        return state.live.pop(address, None) is not None
    if action == "free_completed" and size:
        free = address not in state.live
        state.live[address] = size
        return free
    if action == "segment_alloc":
        part, pool = state.segments.pop(address, None), recorded_pool(entry)
        if part is None or part.size != size:
            return False
        state.taken[number] = part if pool is None else replace(part, pool=pool, released=None)
    if action == "segment_free":
        free, pool = not _inside(state.segments, address, size), recorded_pool(entry)
        part = Mapped(size, entry.get("stream", 0), size == SMALL_SEGMENT, pool or DEFAULT_POOL)
        if pool is None:
            part, state.untold[number] = replace(part, released=number), DEFAULT_POOL
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
    return sorted(
        start
        for start, part in mapped.items()
        if start < address + size and start + part.size > address
    )


def _cut_out(mapped: dict[int, Mapped], address: int, size: int) -> bool:
    """Remove [address, address + size) from `mapped`, whose entries it may cut. False if not all of it is mapped."""
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


def _settings(snapshot: dict[str, Any], device: int) -> Settings:
    """The settings that the history was recorded with. Raises `UserError` if the model does not implement them."""
    actions = {entry["action"] for entry in snapshot["device_traces"][device]}
    if actions - set(ACTIONS):
        raise UserError(
            f"device {device} has events {sorted(actions - set(ACTIONS))!r}, which the replay does not know"
        )
    recorded = snapshot.get("allocator_settings")
    recorded = recorded if isinstance(recorded, dict) else {}
    divisions = recorded.get("roundup_power2_divisions")
    numbers = [
        n or 0 for n in (divisions.values() if isinstance(divisions, dict) else [divisions])
    ] or [0]
    if not all(type(n) is int and n >= 0 and n & (n - 1) == 0 and n == numbers[0] for n in numbers):
        raise UserError(
            f"device {device} was recorded with roundup_power2_divisions {divisions!r}, of which the replay knows one"
            " power of two for all sizes"
        )
    written = str(
        recorded.get("PYTORCH_CUDA_ALLOC_CONF") or recorded.get("PYTORCH_ALLOC_CONF") or ""
    )
    for name, size in re.findall(
        r"(large_segment_size_mb|max_non_split_rounding_mb)\s*:\s*(\w+)", written
    ):
        if size != "20":
            raise UserError(
                f"device {device} was recorded with {name}:{size}, of which the replay knows only 20"
            )
    most = recorded.get("max_split_size", -1)
    segments = [s for s in snapshot["segments"] if s.get("device", 0) == device]
    kinds = {bool(s.get("is_expandable")) for s in segments}
    kinds |= {True} if actions & {"segment_map", "segment_unmap"} else set()
    kinds |= {False} if actions & {"segment_alloc", "segment_free"} else set()
    if len(kinds) > 1:
        raise UserError(
            f"device {device} was recorded with expandable segments beside ordinary ones, which the replay does not"
            " follow: which of them a request may take cannot be told"
        )
    return Settings(
        max_split_size=most if type(most) is int and 0 < most < 2**63 else None,
        roundup_power2_divisions=numbers[0],
        expandable_segments=kinds == {True},
    )


def _bound_rests(state: State, trace: list[dict[str, Any]], device: int) -> None:
    """Fill `state.rests`, from the gap behind each block and from the first allocation that is made in that gap."""
    order = sorted(state.live)
    ends = sorted((address + part.size, address) for address, part in joined(state).items())
    open_gaps: dict[int, tuple[int, int, int]] = {}
    most_split = state.settings.max_split_size
    for position, address in enumerate(order):
        at = bisect_left(ends, (address + 1, 0))
        if at == len(ends) or address < ends[at][1]:
            raise UserError(
                f"device {device}: the block at {address:#x} lies in no segment: the history is incomplete"
            )
        end, segment = ends[at]
        behind = min(order[position + 1], end) if position + 1 < len(order) else end
        size = state.rounded(state.live[address])
        used = address + size
        gap = behind - used
        if gap < 0:
            raise UserError(
                f"device {device}: the block at {address:#x} reaches into the next: the history is damaged"
            )
        if address in state.sizes:
            rest = state.sizes[address] - size
            state.rests[address] = rest, rest
        elif state.settings.expandable_segments or state.segments[segment].small:
            state.rests[address] = 0, 0
        elif gap <= SMALL_REQUEST or (
            most_split is not None and size >= most_split
        ):  # such a block is never split
            state.rests[address] = gap, gap
        else:  # the gap ends with a free block, which in the large pool has more than 1 MiB
            most = min(SMALL_REQUEST, gap - SMALL_REQUEST - MIN_BLOCK)
            open_gaps[address] = used, most, end
            state.rests[address] = 0, most
    for entry in trace:
        address = entry.get("addr", 0)
        if entry["action"] == "alloc" and entry.get("size"):
            position = bisect_left(order, address)
            before = order[position - 1] if position else -1
            if before in open_gaps and address < open_gaps[before][2]:
                used, most, _ = open_gaps.pop(before)
                if 0 <= address - used <= most:
                    state.rests[before] = address - used, address - used
            insort(order, address)
        elif entry["action"] == "free_completed" and entry.get("size"):
            position = bisect_left(order, address)
            if position < len(order) and order[position] == address:
                order.pop(position)
            open_gaps.pop(address, None)
