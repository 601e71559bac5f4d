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
 5. A freed block is merged with the free blocks next to it in its segment. A segment that is wholly
    free stays reserved for its stream until the device has no room: then all wholly free segments
    are returned, and the request is retried.
The model does not know at which address the device puts a segment (here each one follows the
last), nor that a freed block may still be in use by other streams.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ds_cmli.memory_model.blocks import (
    FIRST_ADDRESS,
    MIN_BLOCK,
    SMALL_REQUEST,
    Action,
    Block,
    Event,
    OutOfMemory,
    Place,
    Segment,
    join,
    rounded,
    segment_bytes,
    split,
)


class CachingAllocator:
    """The model; it reserves at most `limit` bytes (None: any)."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.segments: dict[int, Segment] = {}  # by address
        # (small, stream) -> each free block's place in the order of rule 3, sorted.
        self.free_blocks: dict[tuple[bool, int], list[Place]] = {}
        self.at: dict[int, Block] = {}  # the free blocks by address
        self.actions: list[Action] = []
        self.requested = self.allocated = self.reserved = 0
        self.next_address = FIRST_ADDRESS
        self.taken = 0  # segments
        self.retries = 0  # requests for which all cached memory was returned

    def malloc(self, requested: int, stream: int = 0, event: Event | None = None) -> Block:
        """Allocate a block for `requested` bytes.

        Raises `OutOfMemory` if `limit` leaves no room for it.
        """
        size = rounded(requested)
        small = size <= SMALL_REQUEST
        free = self.free_blocks.setdefault((small, stream), [])
        position = bisect_left(free, (size,))
        if position < len(free):
            block = self.at.pop(free.pop(position)[-1])
        else:
            block = self._from_device(requested, size, stream, event)
        left = block.size - size
        if left >= MIN_BLOCK if small else left > SMALL_REQUEST:  # rule 4
            self._keep(split(block, block.address + size))
        self.actions.append(Action("alloc", block.address, requested, stream, event))
        block.requested, block.event = requested, event
        self.requested += requested
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        for name in ("free_requested", "free_completed"):
            self.actions.append(
                Action(name, block.address, block.requested, block.segment.stream, block.event)
            )
        self.requested -= block.requested
        self.allocated -= block.size
        block.requested, block.event = 0, None
        self._merge(block)

    def empty_cache(self) -> None:
        """Return the wholly free segments to the device."""

        def order(segment: Segment) -> tuple[bool, int, int, int]:
            return segment.small, segment.stream, segment.size, segment.address

        for segment in sorted(self.segments.values(), key=order):
            if segment.free:
                self._take(segment.first)
                del self.segments[segment.address]
                self.reserved -= segment.size
                address, size, stream = segment.address, segment.size, segment.stream
                self.actions.append(Action("segment_free", address, size, stream, None))

    def _merge(self, block: Block) -> Block:
        """Merge a freed block with its free neighbours, and put the result on the free list."""
        before, after = block.before, block.after
        if before is not None and before.free:
            self._take(before)
            block = join(before, block)
        if after is not None and after.free:
            self._take(after)
            block = join(block, after)
        self._keep(block)
        return block

    def _from_device(self, requested: int, size: int, stream: int, event: Event | None) -> Block:
        """Reserve memory; returns a free block of at least `size` bytes, on no free list."""
        taken = segment_bytes(size)
        if self.limit is not None and self.reserved + taken > self.limit:
            self.retries += 1
            self.empty_cache()
            if self.reserved + taken > self.limit:
                missing = self.reserved + taken - self.limit
                held = self.allocated, self.reserved
                raise OutOfMemory(requested, *held, self.limit, missing, event)
        self.taken += 1
        small = size <= SMALL_REQUEST
        segment = Segment(self.next_address, taken, stream, small, event=event, number=self.taken)
        self.next_address += taken
        self.segments[segment.address] = segment
        self.reserved += taken
        self.actions.append(Action("segment_alloc", segment.address, taken, stream, event))
        return segment.first

    def _keep(self, block: Block) -> None:
        """Put a block on the free list."""
        insort(self.free_blocks.setdefault(block.segment.key, []), block.place)
        self.at[block.address] = block

    def _take(self, block: Block) -> None:
        """Take a block off the free list."""
        free = self.free_blocks[block.segment.key]
        free.pop(bisect_left(free, block.place))
        del self.at[block.address]


@dataclass
class Replay:
    """The result of `replay`, in bytes.

    The timeline has (requested, allocated, reserved) after each event.
    """

    requested_peak: int
    allocated_peak: int
    reserved_peak: int
    timeline: list[tuple[int, int, int]]
    segments: list[Segment]  # those reserved at the end
    actions: list[Action]
    retries: int = 0  # requests that had no room until all cached memory was returned


def replay(
    events: Iterable[Event],
    *,
    limit: int | None = None,
    stream: Callable[[Event], int] = lambda event: event.stream,
) -> Replay:
    """Run `events` through the allocator.

    Args:
        limit: bytes that may be reserved: the device's memory minus the CUDA context and what other
            processes hold. None: no limit.
        stream: gives the stream of an allocation; by default the event's own.

    Raises:
        OutOfMemory: a request does not fit in `limit`; the exception names it.
    """
    allocator = CachingAllocator(limit)
    live: dict[int, Block] = {}
    timeline = []
    for event in events:
        if event.bytes > 0:
            live[event.block] = allocator.malloc(event.bytes, stream(event), event)
        elif event.bytes < 0:
            allocator.free(live.pop(event.block))
        else:
            allocator.empty_cache()
        timeline.append((allocator.requested, allocator.allocated, allocator.reserved))
    requested, allocated, reserved = map(max, zip((0, 0, 0), *timeline, strict=True))
    segments = list(allocator.segments.values())
    actions, retries = allocator.actions, allocator.retries
    return Replay(requested, allocated, reserved, timeline, segments, actions, retries)


def by_retries(count: int) -> str:
    """What a sentence says of what fits only by so many retries of the allocator; 0: nothing."""
    tries = "1 retry" if count == 1 else f"{count} retries"
    return f", only as PyTorch's allocator returns its cache ({tries})" if count else ""


def on_device(events: Sequence[Event], limit: int, outside: int) -> tuple[Replay, int]:
    """Replay events where no more than `limit` bytes can be occupied, else without a limit.

    Returns also the bytes that are then occupied, `outside` the allocator included: more than the
    limit do not fit.
    """
    try:
        replayed = replay(events, limit=limit - outside)
    except OutOfMemory:
        replayed = replay(events)
    return replayed, replayed.reserved_peak + outside
