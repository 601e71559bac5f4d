"""The owner of the memory at each address, in a recorded history with expandable segments.

Each pool of each stream reserves one range of addresses, larger than the device's memory, into
which memory is mapped. When it has no memory left, it is given up, and another pool can get its
addresses. A history records the stream of each event, and of a range that has memory at the end
also its pool. The addresses separate the ranges: they do not overlap, and between the beginnings of
two there is more than the device's memory.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from ds_cmli.allocator.blocks import DEFAULT_POOL, LARGE_SEGMENT, Pool
from ds_cmli.allocator.state import Entry, SegmentRange, State

LEAST_WIDTH = 4 << 30  # bytes: a range is 9/8 as large as the GPU's memory
FOREVER = 1 << 62


@dataclass(eq=False)
class KnownRange(SegmentRange):
    """What is known of a range so far, going back from the end of the history."""

    mapped: int = 0  # bytes
    certain: bool = True  # whether `small` is known
    recorded: Pool | None = None  # the pool, if the history records it
    unmapped: list[int] = field(default_factory=list)  # numbers of the events that unmap memory

    def distance(self, entry: Entry) -> int:
        return max(self.begin - entry.address - entry.size, entry.address - self.end, 0)

    def overlaps(self, other: SegmentRange) -> bool:
        return self is not other and other.begin < self.end and self.begin < other.end


def find_ranges(state: State, trace: list[Entry]) -> int | None:
    """Fill `state.ranges`, `state.range_at`, `state.assumed_pools` and `state.private`.

    `state.segments` are here those at the end of the history. Returns the number of an event that
    contradicts what came after, if there is one.
    """
    now = _at_the_end(state)  # the ranges that have memory after the event
    ranges = list(now)
    extent = max((found.end - found.begin for found in now), default=0)
    width = max(LEAST_WIDTH, extent, _reserved_peak(state, trace)) * 9 // 8
    for number, entry in reversed(list(enumerate(trace))):
        if entry.action == "segment_map":
            found = next((one for one in now if one.holds(entry.address)), None)
            if found is None:
                return number
            _undo_map(found, number, entry)
            if found.mapped <= 0:
                now.remove(found)
        elif entry.action == "segment_unmap":
            found = _range_of(now, entry, width)
            if found is None:
                found = _new_range(number, entry)
                now.append(found)
                ranges.append(found)
            _undo_unmap(found, number, entry)
            if any(one.overlaps(found) for one in now):
                return number
        else:
            continue
        found.recorded = found.recorded or entry.pool
        found.uses += 1
        state.range_at[number] = found
    for found in now:
        found.first = -1
    state.ranges = list(now)
    certain = _name_pools(ranges)
    for found in ranges:
        if found.recorded is None:
            state.assumed_pools.update(dict.fromkeys(found.unmapped, found.pool))
        if found in certain:
            state.private.update(found.unmapped)
    return None


def _at_the_end(state: State) -> list[KnownRange]:
    ranges: list[KnownRange] = []
    for address, part in sorted(state.segments.items()):
        key = part.small, part.stream, part.pool
        last = next(reversed(ranges), None)
        if last is None or (last.small, last.stream, last.recorded) != key:
            last = KnownRange(
                address, address, part.small, part.stream, last=FOREVER, recorded=part.pool
            )
            ranges.append(last)
        last.end = address + part.size
        last.mapped += part.size
    return ranges


def _reserved_peak(state: State, trace: list[Entry]) -> int:
    peak = reserved = sum(part.size for part in state.segments.values())
    for entry in reversed(trace):
        if entry.action == "segment_map":
            reserved -= entry.size
        elif entry.action == "segment_unmap":
            reserved += entry.size
        peak = max(peak, reserved)
    return peak


def _undo_map(found: KnownRange, number: int, entry: Entry) -> None:
    if not found.certain:
        found.small, found.certain = entry.size % LARGE_SEGMENT != 0, True
    found.mapped -= entry.size
    found.first = number


def _undo_unmap(found: KnownRange, number: int, entry: Entry) -> None:
    found.begin = min(found.begin, entry.address)
    found.end = max(found.end, entry.address + entry.size)
    found.mapped += entry.size
    found.unmapped.append(number)


def _new_range(number: int, entry: Entry) -> KnownRange:
    """A range whose last memory is unmapped by `entry`."""
    # If it is not small by its size, it may still be ten pieces of the small pool.
    small = entry.size % LARGE_SEGMENT != 0
    end = entry.address + entry.size
    return KnownRange(entry.address, end, small, entry.stream, last=number, certain=small)


def _range_of(now: list[KnownRange], entry: Entry, width: int) -> KnownRange | None:
    """Find the nearest range that `entry`, which unmaps memory, can belong to."""
    small = entry.size % LARGE_SEGMENT != 0
    near = []
    for found in now:
        end, begin = max(found.end, entry.address + entry.size), min(found.begin, entry.address)
        if (
            found.stream == entry.stream
            and (found.small or not found.certain or not small)
            and (entry.pool is None or found.recorded in (None, entry.pool))
            and end - begin < width
            and not _separated(now, found, entry.address)
        ):
            near.append(found)
    nearest = min(near, key=lambda one: one.distance(entry), default=None)
    if nearest is not None and not nearest.certain and small:
        nearest.small, nearest.certain = True, True
    return nearest


def _separated(now: list[KnownRange], found: KnownRange, address: int) -> bool:
    """Whether another range begins between that of `found` and `address`."""
    low, high = sorted((found.begin, address))
    return any(other is not found and low < other.begin < high for other in now)


def _name_pools(ranges: list[KnownRange]) -> set[KnownRange]:
    """Decide whose the ranges are whose pool is not recorded. Returns those certain to be private.

    At any time a pool has one range for each stream and class of sizes. So besides the default
    pool's, it is a private pool's; without, it counts as the default pool's.
    """
    certain: set[KnownRange] = set()
    default: dict[tuple[bool, int], list[KnownRange]] = defaultdict(list)
    private: dict[tuple[bool, int], int] = defaultdict(int)
    for found in sorted(ranges, key=lambda found: (found.recorded is None, -found.uses)):
        key = found.small, found.stream
        beside = [
            one for one in default[key] if found.first <= one.last and one.first <= found.last
        ]
        found.pool = found.recorded or DEFAULT_POOL
        if found.recorded is None and beside:
            found.pool = (-1, private[key])
            private[key] += 1
            if any(other.recorded for other in beside):
                certain.add(found)
        if found.pool == DEFAULT_POOL:
            default[key].append(found)
    return certain
