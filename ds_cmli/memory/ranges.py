"""Whose memory is at which address, in a recorded history with expandable segments.

Each pool of each stream reserves one range of addresses, larger than the device's memory, into which memory is mapped.
A history tells the stream of each event, and of a range that has memory at the end also its pool. The addresses tell
the ranges apart: there is more than the reserved memory between the beginnings of two, and none lies within another.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from ds_cmli.memory.blocks import DEFAULT_POOL, LARGE_SEGMENT, Pool
from ds_cmli.memory.state import State, recorded_pool

LEAST_WIDTH = 4 << 30  # bytes: a range is 9/8 as large as the GPU's memory
FOREVER = 1 << 62


@dataclass
class Range:
    """What is known of one range: the addresses that the history names, and when there was memory at them."""

    begin: int
    end: int
    small: bool
    stream: int
    pool: Pool | None
    first: int  # number of the first event that maps memory
    last: int  # number of the last event; FOREVER: memory is there at the end
    before: int  # bytes that were mapped before the first event
    uses: int = 1


def find_ranges(state: State, trace: list[dict[str, Any]]) -> None:
    """Fill `state.ranges`, `state.untold` and `state.private`. `state.segments` are here those at the end."""
    known = [
        Range(address, address + part.size, part.small, part.stream, part.pool, FOREVER, FOREVER, part.size)
        for address, part in state.segments.items()
    ]
    unmapped: list[Range] = []
    peak = reserved = sum(part.size for part in state.segments.values())
    for number, entry in reversed(list(enumerate(trace))):
        address, size, pool = entry.get("addr", 0), entry.get("size", 0), recorded_pool(entry)
        small, stream = size % LARGE_SEGMENT != 0, entry.get("stream", 0)
        if entry["action"] == "segment_map":
            known.append(Range(address, address + size, small, stream, pool, number, number, -size))
            reserved -= size
        elif entry["action"] == "segment_unmap":
            unmapped.append(Range(address, address + size, small, stream, pool, FOREVER, number, size))
            reserved += size
        peak = max(peak, reserved)
    width = max(LEAST_WIDTH, peak) * 9 // 8
    ranges = _joined(known, width)
    for piece in unmapped:  # ten pieces of the small pool are as large as one of the large pool
        near = [found for found in ranges if found.stream == piece.stream and _distance(found, piece) < width]
        nearest = min(near, key=lambda found: _distance(found, piece), default=piece)
        piece.small = piece.small or nearest.small
    ranges = _joined(known + unmapped, width)
    guessed, sure = _name_pools(ranges)
    state.ranges = {found.begin: (found.pool or DEFAULT_POOL, found.small, found.stream) for found in ranges}
    for piece in unmapped:
        begin = state.range_of(piece.begin)
        if begin in guessed:
            state.untold[piece.last] = state.ranges[begin][0]
        if begin in sure:
            state.private.add(piece.last)


def _distance(found: Range, part: Range) -> int:
    return max(found.begin - part.end, part.begin - found.end, 0)


def _joined(parts: list[Range], width: int) -> list[Range]:
    """The ranges that neighbouring parts belong to."""
    out: list[Range] = []
    for part in sorted(parts, key=lambda part: part.begin):
        found = out[-1] if out else part
        same = (found.small, found.stream) == (part.small, part.stream)
        pools = {found.pool, part.pool} - {None}
        near = part.begin - found.begin < width or (None not in (found.pool, part.pool))
        if not out or not same or len(pools) > 1 or not near:
            out.append(Range(**vars(part)))
            continue
        found.end, found.pool = max(found.end, part.end), found.pool or part.pool
        found.first, found.last = min(found.first, part.first), max(found.last, part.last)
        found.before, found.uses = found.before + part.before, found.uses + part.uses
    return out


def _name_pools(ranges: list[Range]) -> tuple[set[int], set[int]]:
    """Decide whose the ranges are of which no memory is left at the end.

    At any time a pool has one range for each stream and class of sizes. So beside the default pool's, it is a private
    pool's; without, it counts as the default pool's.

    Returns where these ranges begin, and where those begin that are surely private pools'.
    """
    guessed: set[int] = set()
    sure: set[int] = set()
    default: dict[tuple[bool, int], list[tuple[int, int, bool]]] = defaultdict(list)
    private: dict[tuple[bool, int], int] = defaultdict(int)
    for found in sorted(ranges, key=lambda found: (found.pool is None, -found.uses)):
        key = found.small, found.stream
        begin, end = -1 if found.before > 0 else found.first, found.last
        if found.pool is None:
            guessed.add(found.begin)
            found.pool = DEFAULT_POOL
            beside = [known for first, last, known in default[key] if begin <= last and first <= end]
            if any(beside):
                sure.add(found.begin)
            if beside:
                found.pool = (-1, private[key])
                private[key] += 1
        if found.pool == DEFAULT_POOL:
            default[key].append((begin, end, found.begin not in guessed))
    return guessed, sure
