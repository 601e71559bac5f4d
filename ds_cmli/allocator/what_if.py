"""Replays a recorded history under another limit or other settings of CUDA's allocator: does it fit, what is reserved?

With only another limit the replay begins in the state in which the recording began. With other settings the blocks of
that state would be at other addresses: they are allocated anew, in the order of their recorded addresses.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from ds_cmli.allocator.allocator import CachingAllocator
from ds_cmli.allocator.blocks import Block, OutOfMemory, Settings
from ds_cmli.allocator.expandable import ExpandableAllocator
from ds_cmli.allocator.pools import Recorded
from ds_cmli.allocator.state import State, restore

INVENTED = 1 << 62  # the first address of new segments: no recorded segment is there
GIVEN_BACK = ("segment_free", "segment_unmap")


@dataclass(frozen=True)
class WhatIf:
    fits: bool
    reserved_peak: int
    allocated_peak: int
    failed_at: int | None = (
        None  # number of the failed allocation, from 0 on; -1: the initial state does not fit
    )
    failed_request: int = 0  # the bytes that it requested
    too_much: int = 0  # bytes that would have to be freed for it
    failed_event: int = 0  # number of events before it

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def what_if(
    start: State,
    trace: list[dict[str, Any]],
    limit: int | None = None,
    settings: Settings | None = None,
) -> WhatIf:
    """Replay the requests of `trace` from the state `start`, under `settings` (None: those of the recording).

    Where the recording returned segments of a pool to the device, all free segments of that pool are returned here: the
    cause was most likely `empty_cache`, which the program would call again.
    """
    number, at = -1, 0
    recorded, emptied = Recorded(start), None
    reserved = allocated = 0
    settings = start.settings if settings is None else settings
    allocator = CachingAllocator()
    try:
        if settings == start.settings:
            allocator, blocks = restore(start)
            allocator.limit, allocator.next_address = limit, INVENTED
            if limit is not None and allocator.reserved > limit:
                allocator.empty_cache()
                if allocator.reserved > limit:
                    missing = allocator.reserved - limit
                    raise OutOfMemory(
                        0, allocator.allocated, allocator.reserved, limit, missing, None
                    )
        else:
            allocator, blocks = _anew(start, limit, settings)
        reserved, allocated = allocator.reserved, allocator.allocated
        for at, entry in enumerate(trace):
            action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
            if action == "alloc" and size:
                number += 1
                blocks[address] = allocator.malloc(
                    size, entry.get("stream", 0), pool=recorded.pool(entry)
                )
            elif action == "free_completed" and address in blocks:
                allocator.free(blocks.pop(address))
            elif action in GIVEN_BACK and emptied != recorded.pool(entry):
                allocator.empty_cache(recorded.pool(entry))
            emptied = recorded.pool(entry) if action in GIVEN_BACK else None
            recorded.follow(at, entry)
            reserved = max(reserved, allocator.reserved)
            allocated = max(allocated, allocator.allocated)
    except OutOfMemory as error:
        return WhatIf(
            False,
            max(reserved, allocator.reserved),
            allocated,
            number,
            error.requested,
            error.missing,
            at,
        )
    return WhatIf(True, reserved, allocated)


def _anew(
    start: State, limit: int | None, settings: Settings
) -> tuple[CachingAllocator, dict[int, Block]]:
    kind = ExpandableAllocator if settings.expandable_segments else CachingAllocator
    allocator, blocks = kind(limit, settings), {}
    segments = sorted(start.segments)
    for address, size in sorted(start.live.items()):
        part = start.segments[segments[bisect_right(segments, address) - 1]]
        blocks[address] = allocator.malloc(size, part.stream, pool=part.pool)
    return allocator, blocks
