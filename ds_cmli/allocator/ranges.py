"""Whose memory is at which address, in a recorded history with expandable segments.

Each pool of each stream reserves one range of addresses, larger than the device's memory, into which memory is mapped.
When it has no memory left, it is given up, and another pool can get its addresses. A history tells the stream of each
event, and of a range that has memory at the end also its pool. The addresses tell the ranges apart: they do not
overlap, and between the beginnings of two there is more than the device's memory.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ds_cmli.allocator.blocks import DEFAULT_POOL, LARGE_SEGMENT, Pool
from ds_cmli.allocator.state import Range, State, recorded_pool

LEAST_WIDTH = 4 << 30  # bytes: a range is 9/8 as large as the GPU's memory
FOREVER = 1 << 62


@dataclass(eq=False)
class Found(Range):
    """What is known of a range so far, going back from the end of the history."""

    mapped: int = 0  # bytes
    certain: bool = True  # whether `small` is known
    told: Pool | None = None  # the pool, if the history tells it
    unmapped: list[int] = field(default_factory=list)  # numbers of the events that unmap memory

    def distance(self, address: int, end: int) -> int:
        return max(self.begin - end, address - self.end, 0)


def find_ranges(state: State, trace: list[dict[str, Any]]) -> int | None:
    """Fill `state.ranges`, `state.range_at`, `state.untold` and `state.private`.

    `state.segments` are here those at the end of the history. Returns the number of an event that contradicts what came
    after, if there is one.
    """
    now: list[Found] = []  # the ranges that have memory after the event
    for address, part in sorted(state.segments.items()):
        last = now[-1] if now else None
        if last is None or (last.small, last.stream, last.told) != (
            part.small,
            part.stream,
            part.pool,
        ):
            now.append(
                Found(address, address, part.small, part.stream, last=FOREVER, told=part.pool)
            )
        now[-1].end = address + part.size
        now[-1].mapped += part.size
    ranges = list(now)
    extent = max((found.end - found.begin for found in now), default=0)
    width = max(LEAST_WIDTH, extent, _reserved_peak(state, trace)) * 9 // 8
    for number, entry in reversed(list(enumerate(trace))):
        address, size = entry.get("addr", 0), entry.get("size", 0)
        if entry["action"] == "segment_map":
            found = next((one for one in now if one.begin <= address < one.end), None)
            if found is None:
                return number
            if not found.certain:
                found.small, found.certain = size % LARGE_SEGMENT != 0, True
            found.mapped -= size
            found.first = number
            if found.mapped <= 0:
                now.remove(found)
        elif entry["action"] == "segment_unmap":
            found = _range_of(now, entry, width)
            if found is None:
                small = (
                    size % LARGE_SEGMENT != 0
                )  # else it may still be ten pieces of the small pool
                found = Found(
                    address,
                    address + size,
                    small,
                    entry.get("stream", 0),
                    last=number,
                    certain=small,
                )
                now.append(found)
                ranges.append(found)
            found.begin, found.end = min(found.begin, address), max(found.end, address + size)
            found.mapped += size
            found.unmapped.append(number)
            if any(
                one is not found and one.begin < found.end and found.begin < one.end for one in now
            ):
                return number
        else:
            continue
        found.told = found.told or recorded_pool(entry)
        found.uses += 1
        state.range_at[number] = found
    for found in now:
        found.first = -1
    state.ranges = list(now)
    sure = _name_pools(ranges)
    for found in ranges:
        if found.told is None:
            state.untold.update(dict.fromkeys(found.unmapped, found.pool))
        if found in sure:
            state.private.update(found.unmapped)
    return None


def _reserved_peak(state: State, trace: list[dict[str, Any]]) -> int:
    peak = reserved = sum(part.size for part in state.segments.values())
    for entry in reversed(trace):
        reserved += {"segment_map": -1, "segment_unmap": 1}.get(entry["action"], 0) * entry.get(
            "size", 0
        )
        peak = max(peak, reserved)
    return peak


def _range_of(now: list[Found], entry: dict[str, Any], width: int) -> Found | None:
    """The range that the unmapped memory of an event belonged to, if that has memory afterwards: the nearest one."""
    address, size, told = entry.get("addr", 0), entry.get("size", 0), recorded_pool(entry)
    end = address + size
    near = [
        found
        for found in now
        if found.stream == entry.get("stream", 0)
        and (found.small or not found.certain or size % LARGE_SEGMENT == 0)
        and (told is None or found.told in (None, told))
        and max(found.end, end) - min(found.begin, address) < width
        and not any(other is not found and found.begin < other.begin < address for other in now)
        and not any(other is not found and address < other.begin < found.begin for other in now)
    ]
    found = min(near, key=lambda one: one.distance(address, end), default=None)
    if found is not None and not found.certain and size % LARGE_SEGMENT:
        found.small, found.certain = True, True
    return found


def _name_pools(ranges: list[Found]) -> set[Found]:
    """Decide whose the ranges are whose pool the history does not tell. Returns those that are surely private pools'.

    At any time a pool has one range for each stream and class of sizes. So beside the default pool's, it is a private
    pool's; without, it counts as the default pool's.
    """
    sure: set[Found] = set()
    default: dict[tuple[bool, int], list[Found]] = defaultdict(list)
    private: dict[tuple[bool, int], int] = defaultdict(int)
    for found in sorted(ranges, key=lambda found: (found.told is None, -found.uses)):
        key = found.small, found.stream
        beside = [
            other
            for other in default[key]
            if found.first <= other.last and other.first <= found.last
        ]
        found.pool = found.told or DEFAULT_POOL
        if found.told is None and beside:
            found.pool = (-1, private[key])
            private[key] += 1
            if any(other.told for other in beside):
                sure.add(found)
        if found.pool == DEFAULT_POOL:
            default[key].append(found)
    return sure
