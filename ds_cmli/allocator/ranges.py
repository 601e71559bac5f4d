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
    extent = max((known.end - known.begin for known in now), default=0)
    width = max(LEAST_WIDTH, extent, _reserved_peak(state, trace)) * 9 // 8
    for number, entry in reversed(list(enumerate(trace))):
        if entry.action == "segment_map":
            known = next((one for one in now if one.holds(entry.address)), None)
            if known is None:
                return number
            _undo_map(known, number, entry)
            if known.mapped <= 0:
                now.remove(known)
        elif entry.action == "segment_unmap":
            known = _range_of(now, entry, width)
            if known is None:
                known = _new_range(number, entry)
                now.append(known)
                ranges.append(known)
            _undo_unmap(known, number, entry)
            if any(one.overlaps(known) for one in now):
                return number
        else:
            continue
        known.recorded = known.recorded or entry.pool
        known.uses += 1
        state.range_at[number] = known
    for known in now:
        known.first = -1
    state.ranges = list(now)
    certain = _name_pools(ranges)
    for known in ranges:
        if known.recorded is None:
            state.assumed_pools.update(dict.fromkeys(known.unmapped, known.pool))
        if known in certain:
            state.private.update(known.unmapped)
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


def _undo_map(known: KnownRange, number: int, entry: Entry) -> None:
    if not known.certain:
        known.small, known.certain = entry.size % LARGE_SEGMENT != 0, True
    known.mapped -= entry.size
    known.first = number


def _undo_unmap(known: KnownRange, number: int, entry: Entry) -> None:
    known.begin = min(known.begin, entry.address)
    known.end = max(known.end, entry.address + entry.size)
    known.mapped += entry.size
    known.unmapped.append(number)


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
    for known in now:
        end, begin = max(known.end, entry.address + entry.size), min(known.begin, entry.address)
        if (
            known.stream == entry.stream
            and (known.small or not known.certain or not small)
            and (entry.pool is None or known.recorded in (None, entry.pool))
            and end - begin < width
            and not _separated(now, known, entry.address)
        ):
            near.append(known)
    nearest = min(near, key=lambda one: one.distance(entry), default=None)
    if nearest is not None and not nearest.certain and small:
        nearest.small, nearest.certain = True, True
    return nearest


def _separated(now: list[KnownRange], known: KnownRange, address: int) -> bool:
    """Whether another range begins between that of `found` and `address`."""
    low, high = sorted((known.begin, address))
    return any(other is not known and low < other.begin < high for other in now)


def _name_pools(ranges: list[KnownRange]) -> set[KnownRange]:
    """Decide whose the ranges are whose pool is not recorded. Returns those certain to be private.

    At any time a pool has one range for each stream and class of sizes. So besides the default
    pool's, it is a private pool's; without, it counts as the default pool's.
    """
    certain: set[KnownRange] = set()
    default: dict[tuple[bool, int], list[KnownRange]] = defaultdict(list)
    private: dict[tuple[bool, int], int] = defaultdict(int)
    for known in sorted(ranges, key=lambda known: (known.recorded is None, -known.uses)):
        key = known.small, known.stream
        beside = [
            one for one in default[key] if known.first <= one.last and one.first <= known.last
        ]
        known.pool = known.recorded or DEFAULT_POOL
        if known.recorded is None and beside:
            known.pool = (-1, private[key])
            private[key] += 1
            if any(other.recorded for other in beside):
                certain.add(known)
        if known.pool == DEFAULT_POOL:
            default[key].append(known)
    return certain
