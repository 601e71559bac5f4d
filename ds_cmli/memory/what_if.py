"""A recorded history under another limit or other settings of CUDA's allocator: does it fit, and what is reserved.

With a limit alone the replay begins as the recording did. Under other settings the blocks of the beginning would lie
elsewhere: they are laid out anew, in the order of their addresses.
"""

from dataclasses import dataclass
from typing import Any

from ds_cmli.memory.allocator import DEFAULTS, Block, CachingAllocator, OutOfMemory, Settings, rounded, segment_bytes
from ds_cmli.memory.history import State, restore


@dataclass(frozen=True)
class WhatIf:
    fits: bool
    reserved_peak: int
    allocated_peak: int
    failed_at: int | None = None  # number of the allocation, from 0 at the first event; -1: of the beginning
    failed_request: int = 0  # its bytes
    too_much: int = 0  # bytes that would have to go for it

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def what_if(
    start: State, trace: list[dict[str, Any]], limit: int | None = None, settings: Settings = DEFAULTS
) -> WhatIf:
    """The requests of `trace` from `start` on.

    Where segments went back, all that are free go back here: by `empty_cache`, most likely, as the program would again.
    """
    number = -1
    reserved = allocated = 0
    allocator = CachingAllocator()
    try:
        if settings == DEFAULTS:
            allocator, blocks = restore(start)
            allocator.limit = limit
            if limit is not None and allocator.reserved > limit:
                allocator.empty_cache()
                if allocator.reserved > limit:
                    raise OutOfMemory(0, allocator.allocated, allocator.reserved, limit, None)
        else:
            allocator, blocks = _anew(start, limit, settings)
        reserved, allocated = allocator.reserved, allocator.allocated
        for at, entry in enumerate(trace):
            action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
            if action == "alloc" and size:
                number += 1
                blocks[address] = allocator.malloc(size, entry.get("stream", 0), pool=start.pool(address))
            elif action == "free_completed" and address in blocks:
                allocator.free(blocks.pop(address))
            elif action == "segment_free" and (at == 0 or trace[at - 1]["action"] != action):
                allocator.empty_cache()
            reserved = max(reserved, allocator.reserved)
            allocated = max(allocated, allocator.allocated)
    except OutOfMemory as error:
        size = segment_bytes(rounded(error.requested, settings.roundup_power2_divisions)) if error.requested else 0
        return WhatIf(
            False, max(reserved, allocator.reserved), allocated, number, error.requested,
            error.reserved + size - error.limit,
        )  # fmt: skip
    return WhatIf(True, reserved, allocated)


def _anew(start: State, limit: int | None, settings: Settings) -> tuple[CachingAllocator, dict[int, Block]]:
    allocator, blocks = CachingAllocator(limit, settings), {}
    segments = sorted(start.segments.items())
    for address, size in sorted(start.live.items()):
        _, (_, stream, pool) = next(item for item in reversed(segments) if item[0] <= address)
        blocks[address] = allocator.malloc(size, stream, pool=pool)
    return allocator, blocks
