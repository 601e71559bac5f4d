"""Replays a recorded history under another limit or other settings of CUDA's allocator.

With only another limit the replay begins in the state in which the recording began. With other
settings the blocks of that state would be at other addresses: they are allocated anew, in the order
of their recorded addresses.
"""

from bisect import bisect_right
from dataclasses import dataclass

from ds_cmli.allocator.allocator import CachingAllocator
from ds_cmli.allocator.blocks import Block, OutOfMemory, Settings
from ds_cmli.allocator.expandable import ExpandableAllocator
from ds_cmli.allocator.pools import Recorded
from ds_cmli.allocator.state import State, Trace, entries, restore

INVENTED = 1 << 62  # the first address of new segments: no recorded segment is there
GIVEN_BACK = ("segment_free", "segment_unmap")


@dataclass
class WhatIf:
    """Whether a history fits; sizes are in bytes."""

    fits: bool = True
    reserved_peak: int = 0
    allocated_peak: int = 0
    # Number of the failed allocation, from 0 on; -1: the initial state does not fit.
    failed_at: int | None = None
    failed_request: int = 0  # the bytes that it requested
    too_much: int = 0  # bytes that would have to be freed for it
    failed_event: int = 0  # number of events before it


def what_if(
    start: State, trace: Trace, limit: int | None = None, settings: Settings | None = None
) -> WhatIf:
    """Replay the requests of `trace` from `start`, under `settings` (None: those of the recording).

    Where the recording returned segments of a pool to the device, all free segments of that pool
    are returned here: the cause was most likely `empty_cache`, which the program would call again.
    """
    settings = settings or start.settings
    allocator, out, number, at = CachingAllocator(), WhatIf(), -1, 0
    try:
        if settings == start.settings:
            allocator, blocks = restore(start)
            _limit(allocator, limit)
        else:
            allocator, blocks = _allocate_anew(start, limit, settings)
        out.reserved_peak, out.allocated_peak = allocator.reserved, allocator.allocated
        recorded, emptied = Recorded(start), None
        for at, entry in enumerate(entries(trace)):
            pool = recorded.pool(entry)
            if entry.action == "alloc" and entry.size:
                number += 1
                blocks[entry.address] = allocator.malloc(entry.size, entry.stream, pool=pool)
            elif entry.action == "free_completed" and entry.address in blocks:
                allocator.free(blocks.pop(entry.address))
            elif entry.action in GIVEN_BACK and emptied != pool:
                allocator.empty_cache(pool)
            emptied = pool if entry.action in GIVEN_BACK else None
            recorded.follow(at, entry)
            out.reserved_peak = max(out.reserved_peak, allocator.reserved)
            out.allocated_peak = max(out.allocated_peak, allocator.allocated)
    except OutOfMemory as error:
        out.fits = False
        out.reserved_peak = max(out.reserved_peak, allocator.reserved)
        out.failed_at, out.failed_event = number, at
        out.failed_request, out.too_much = error.requested, error.missing
    return out


def _limit(allocator: CachingAllocator, limit: int | None) -> None:
    """Let a restored model reserve at most `limit` bytes. Raises `OutOfMemory` if it holds more."""
    allocator.limit, allocator.next_address = limit, INVENTED
    if limit is None or allocator.reserved <= limit:
        return
    allocator.empty_cache()
    missing = allocator.reserved - limit
    if missing > 0:
        raise OutOfMemory(0, allocator.allocated, allocator.reserved, limit, missing, None)


def _allocate_anew(
    start: State, limit: int | None, settings: Settings
) -> tuple[CachingAllocator, dict[int, Block]]:
    """A model with the live blocks of `start`, and these by their recorded addresses."""
    kind = ExpandableAllocator if settings.expandable_segments else CachingAllocator
    allocator, blocks = kind(limit, settings), {}
    segments = sorted(start.segments)
    for address, size in sorted(start.live.items()):
        part = start.segments[segments[bisect_right(segments, address) - 1]]
        blocks[address] = allocator.malloc(size, part.stream, pool=part.pool)
    return allocator, blocks
