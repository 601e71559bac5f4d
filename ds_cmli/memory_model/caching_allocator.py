"""A model of PyTorch's CUDA caching allocator: the bytes it allocates and reserves for requests.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp`, torch 2.13 (but for rule 3 unchanged
since 2.0), with the default settings, so without expandable segments.
 1. A request is rounded up to a multiple of 512 B. A request for 0 bytes allocates nothing.
 2. A request of at most 1 MiB is served by the small pool, which takes segments of 2 MiB from the
    device. A larger one is served by the large pool, which takes a segment of 20 MiB for a request
    below 10 MiB, and otherwise one of the request's size rounded up to a multiple of 2 MiB.
 3. The request gets the smallest free block of its pool and stream that is large enough, among
    equal sizes that of the segment taken first (before torch 2.13: any segment's), and in it the
    one with the lowest address. If there is none, a new segment is taken.
 4. The remainder of the block becomes a free block if it has at least 512 B (small pool) or more
    than 1 MiB (large pool). Otherwise it stays part of the block, and counts as allocated.
 5. If another stream may still read a block, its free is requested first and completed later. In
    between the block is in use, but no longer counted as allocated.
 6. A freed block is merged with the free blocks next to it in its segment. A segment that is wholly
    free stays reserved for its stream until the device has no room: then all wholly free segments
    are returned, and the request is retried.
The device's addresses are not known: here each segment follows the last, so that addresses are in
the order in which segments were taken.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

MIN_BLOCK = 512
SMALL_REQUEST = 1 << 20  # the largest request that the small pool serves
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
MIN_LARGE_SEGMENT_REQUEST = 10 << 20  # from here on a request gets a segment of its own size
ROUND_SEGMENT = 2 << 20
FIRST_ADDRESS = 0x7F00_0000_0000
ADDRESS = attrgetter("address")


@dataclass(frozen=True)
class Event:
    """A change that the allocator sees: an allocation (bytes > 0) or a free (bytes < 0).

    An event of 0 bytes is the request for a free that completes later (`requests_free`), or a call
    of `empty_cache`. Lists of events are in the order in which they happened.
    """

    block_id: int  # the same at the allocation and at the free of a block; not used again
    bytes: int  # requested bytes: positive at the allocation, the same number negative at the free
    category: str  # what the block is for
    phase: str  # the part of a step in which it happened
    op: str = ""  # the operator that allocated the block
    stream: int = 0  # for which the block was allocated; 0: the default one
    requests_free: bool = False


class OutOfMemory(Exception):
    """The modelled device has no room for an allocation."""


@dataclass(eq=False)
class Block:
    """A part of a segment, in use or free."""

    segment: "Segment"
    address: int
    size: int
    requested: int = 0  # 0: free
    free_requested: bool = False
    event: Event | None = None  # the allocation, while the block is in use


@dataclass(eq=False)
class Segment:
    """The memory that one call of cudaMalloc returned."""

    address: int
    size: int
    stream: int
    small: bool
    event: Event | None  # the allocation that needed a new segment
    blocks: list[Block] = field(default_factory=list)  # in the order of their addresses


class Action(NamedTuple):
    """One action of the allocator, named as in `torch.cuda.memory._record_memory_history`."""

    name: str  # one of alloc, free_requested, free_completed, segment_alloc and segment_free
    address: int
    bytes: int  # for alloc and free_*: the requested bytes
    stream: int
    event: Event | None


class CachingAllocator:
    """The model; it reserves at most `limit` bytes (None: any)."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.segments: dict[int, Segment] = {}  # by address
        # (small, stream) -> (size, address, block) of each free block, in the order of rule 3
        self.free_blocks = defaultdict[tuple[bool, int], list[tuple[int, int, Block]]](list)
        self.actions: list[Action] = []
        self.requested = self.allocated = self.reserved = 0
        self.peaks: tuple[int, ...] = (0, 0, 0)  # of requested, allocated and reserved
        self.next_address = FIRST_ADDRESS
        self.retries = 0  # requests for which all cached memory was returned

    def malloc(self, requested: int, stream: int = 0, event: Event | None = None) -> Block:
        """Allocate a block for `requested` bytes.

        Raises `OutOfMemory` if `limit` leaves no room.
        """
        size = round_up(requested, MIN_BLOCK)
        small = size <= SMALL_REQUEST
        candidates = self.free_blocks[small, stream]
        position = bisect_left(candidates, (size,))
        if position < len(candidates):
            _, _, block = candidates.pop(position)
        else:
            (block,) = self._new_segment(requested, size, stream, event).blocks
        left = block.size - size
        is_split = left >= MIN_BLOCK if small else left > SMALL_REQUEST  # rule 4
        if is_split:
            remainder = Block(block.segment, block.address + size, left)
            block.size = size
            insort(block.segment.blocks, remainder, key=ADDRESS)
            self._add_free(remainder)
        self.actions.append(Action("alloc", block.address, requested, stream, event))
        block.requested = requested
        block.event = event
        self.requested += requested
        self.allocated += block.size
        self.peaks = tuple(map(max, self.peaks, (self.requested, self.allocated, self.reserved)))
        return block

    def request_free(self, block: Block) -> None:
        """Count a block as allocated no longer. It is in use: another stream may still read it."""
        self._record("free_requested", block)
        self.allocated -= block.size
        block.free_requested = True

    def free(self, block: Block) -> None:
        if not block.free_requested:
            self.request_free(block)
        self._record("free_completed", block)
        self.requested -= block.requested
        block.requested = 0
        block.free_requested = False
        block.event = None
        # Rule 6: `block` takes the place of the free blocks next to it.
        blocks = block.segment.blocks
        place = bisect_left(blocks, block.address, key=ADDRESS)
        nearby = slice(max(place - 1, 0), place + 2)  # the block, and those next to it
        merged = [other for other in blocks[nearby] if not other.requested]  # with the block itself
        blocks[nearby] = [other for other in blocks[nearby] if other.requested or other is block]
        for other in merged:
            if other is not block:
                self._remove_free(other)
        block.address = merged[0].address
        block.size = sum(other.size for other in merged)
        self._add_free(block)

    def empty_cache(self) -> None:
        """Return the wholly free segments to the device."""
        # PyTorch returns those of the large pool first, in the order in which it keeps free blocks.
        order = attrgetter("small", "stream", "size", "address")
        for segment in sorted(self.segments.values(), key=order):
            first, *others = segment.blocks
            if not first.requested and not others:
                self._remove_free(first)
                del self.segments[segment.address]
                self.reserved -= segment.size
                returned = segment.address, segment.size, segment.stream, None
                self.actions.append(Action("segment_free", *returned))

    def _new_segment(self, requested: int, size: int, stream: int, event: Event | None) -> Segment:
        """Take a new segment from the device for a block of `size` bytes."""
        small = size <= SMALL_REQUEST
        segment_size = LARGE_SEGMENT
        if small:
            segment_size = SMALL_SEGMENT
        elif size >= MIN_LARGE_SEGMENT_REQUEST:
            segment_size = round_up(size, ROUND_SEGMENT)
        if self.limit is not None and self.reserved + segment_size > self.limit:
            self.retries += 1
            self.empty_cache()
            if self.reserved + segment_size > self.limit:
                raise OutOfMemory(
                    f"{requested:,} bytes asked for with {self.reserved:,} of {self.limit:,} "
                    f"reserved, {self.allocated:,} of them allocated"
                )
        segment = Segment(self.next_address, segment_size, stream, small, event)
        segment.blocks.append(Block(segment, segment.address, segment_size))
        self.next_address += segment_size
        self.segments[segment.address] = segment
        self.reserved += segment_size
        self.actions.append(Action("segment_alloc", segment.address, segment_size, stream, event))
        return segment

    def _record(self, name: str, block: Block) -> None:
        stream = block.segment.stream
        self.actions.append(Action(name, block.address, block.requested, stream, block.event))

    def _add_free(self, block: Block) -> None:
        free = self.free_blocks[block.segment.small, block.segment.stream]
        insort(free, (block.size, block.address, block))

    def _remove_free(self, block: Block) -> None:
        free = self.free_blocks[block.segment.small, block.segment.stream]
        free.pop(bisect_left(free, (block.size, block.address)))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def replay(events: Iterable[Event], *, limit: int | None = None) -> CachingAllocator:
    """Return the allocator after `events`, which may reserve at most `limit` bytes.

    Raises `OutOfMemory` if a request does not fit in `limit`.
    """
    allocator = CachingAllocator(limit)
    live: dict[int, Block] = {}
    for event in events:
        if event.bytes > 0:
            live[event.block_id] = allocator.malloc(event.bytes, event.stream, event)
        elif event.bytes < 0:
            allocator.free(live.pop(event.block_id))
        elif event.requests_free:
            allocator.request_free(live[event.block_id])
        else:
            allocator.empty_cache()
    return allocator
