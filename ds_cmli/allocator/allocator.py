"""A model of PyTorch's CUDA caching allocator: the bytes it allocates and reserves for requests.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp`, torch 2.13 (but for rule 3 unchanged
since 2.0), without expandable segments. All `Settings` are off by default, as in PyTorch.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ds_cmli.allocator.blocks import (
    DEFAULT_POOL,
    DEFAULTS,
    FIRST_ADDRESS,
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL_REQUEST,
    Action,
    Block,
    Event,
    OutOfMemory,
    Place,
    Pool,
    Segment,
    Settings,
    join,
    rounded,
    segment_bytes,
    split,
)


class CachingAllocator:
    """The model; it reserves at most `limit` bytes (None: any, without garbage collection)."""

    def __init__(self, limit: int | None = None, settings: Settings = DEFAULTS):
        self.limit, self.settings = limit, settings
        # (pool, small) -> number of requests so far.
        self.requests: dict[tuple[Pool, bool], int] = {}
        self.segments: dict[int, Segment] = {}  # by address
        # (pool, small, stream) -> each free block's place in the order of rule 3, sorted.
        self.free_blocks: dict[tuple[Pool, bool, int], list[Place]] = {}
        self.at: dict[int, Block] = {}  # the free blocks by address
        self.actions: list[Action] = []
        self.requested = self.allocated = self.reserved = 0
        self.next_address = FIRST_ADDRESS
        self.taken = 0  # segments
        self.retries = 0  # requests for which all cached memory was returned

    def malloc(
        self, requested: int, stream: int = 0, event: Event | None = None, pool: Pool = DEFAULT_POOL
    ) -> Block:
        """Allocate a block for `requested` bytes.

        Raises `OutOfMemory` if `limit` leaves no room for it.
        """
        size = rounded(requested, self.settings.roundup_power2_divisions)
        small = size <= SMALL_REQUEST
        self.requests[pool, small] = self.requests.get((pool, small), 0) + 1
        free = self.free_blocks.setdefault((pool, small, stream), [])
        position = self._best_fit(free, size)
        if position < len(free) and self.may_use(free[position][0], size):
            block = self.at.pop(free.pop(position)[-1])
        else:
            block = self._from_device(requested, size, (pool, small, stream), event)
        left = block.size - size
        if self.splits(left, size, small):
            self.keep(split(block, block.address + size))
        self.actions.append(Action("alloc", block.address, requested, stream, event))
        return self.use(block, requested, event)

    def use(self, block: Block, requested: int, event: Event | None = None) -> Block:
        """Mark a block as in use. It must already have been taken off the free lists."""
        block.requested, block.event = requested, event
        self.requested += requested
        self.allocated += block.size
        return block

    def carve(self, free: Block, address: int, size: int) -> Block:
        """Take [address, address + size) out of a free block, whose other parts stay free."""
        self.take(free)
        if address + size < free.address + free.size:
            self.keep(split(free, address + size))
        if address == free.address:
            return free
        block = split(free, address)
        self.keep(free)
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

    def empty_cache(self, pool: Pool = DEFAULT_POOL) -> None:
        """Return the wholly free segments of a pool; a private pool's when it is deleted."""

        def order(segment: Segment) -> tuple[bool, int, int, int]:
            return segment.small, segment.stream, segment.size, segment.address

        for segment in sorted(self.segments.values(), key=order):
            if segment.pool == pool and segment.free:
                self.release(segment)

    def release(self, segment: Segment) -> None:
        """Return one segment to the device. It must be wholly free."""
        self.take(segment.first)
        del self.segments[segment.address]
        self.reserved -= segment.size
        freed = Action("segment_free", segment.address, segment.size, segment.stream, None)
        self.actions.append(freed)

    def _best_fit(self, free: list[Place], size: int) -> int:
        """The index in `free` of rule 3's block; `len(free)` if none is large enough."""
        return bisect_left(free, (size,))

    def splits(self, left: int, size: int, small: bool) -> bool:
        """Rule 4: whether `left` bytes behind a request of `size` bytes become a free block."""
        most = self.settings.max_split_size
        if small:
            return left >= MIN_BLOCK
        return left > SMALL_REQUEST and (most is None or size < most)

    def _merge(self, block: Block) -> Block:
        """Merge a freed block with its free neighbours, and put the result on the free list."""
        before, after = block.before, block.after
        if before is not None and before.free:
            self.take(before)
            block = join(before, block)
        if after is not None and after.free:
            self.take(after)
            block = join(block, after)
        self.keep(block)
        return block

    def _from_device(
        self, requested: int, size: int, key: tuple[Pool, bool, int], event: Event | None
    ) -> Block:
        """Reserve memory; returns a free block of at least `size` bytes, on no free list."""
        pool, small, stream = key
        taken = segment_bytes(size)
        if self.limit is not None:
            self._collect_garbage()
            if self.reserved + taken > self.limit:
                self._release_oversize((pool, small, stream), size)
            if self.reserved + taken > self.limit:
                self.retries += 1
                self.empty_cache()
            if self.reserved + taken > self.limit:
                raise self._out_of_memory(requested, taken, event)
        segment = self.number(Segment(self.next_address, taken, stream, small, pool, event=event))
        self.next_address += taken
        self.segments[segment.address] = segment
        self.reserved += taken
        self.actions.append(Action("segment_alloc", segment.address, taken, stream, event))
        return segment.first

    def number(self, segment: Segment) -> Segment:
        """Give a new segment its place among those of rule 3."""
        self.taken += 1
        segment.number = 0 if self.settings.by_address else self.taken
        return segment

    def _out_of_memory(self, requested: int, taken: int, event: Event | None) -> OutOfMemory:
        assert self.limit is not None
        missing = self.reserved + taken - self.limit
        return OutOfMemory(requested, self.allocated, self.reserved, self.limit, missing, event)

    def may_use(self, block_size: int, size: int) -> bool:
        """Whether a free block of `block_size` may serve `size` bytes (see `max_split_size`)."""
        most = self.settings.max_split_size
        if most is None:
            return True
        if size < most:
            return block_size < most
        return block_size < size + LARGE_SEGMENT

    def _collect_garbage(self) -> None:
        threshold = self.settings.garbage_collection_threshold
        if self.limit is None or not threshold:
            return
        over = self.reserved - int(threshold * self.limit)
        requests = self.requests.get((DEFAULT_POOL, False), 0)
        whole = {
            segment.address: requests - segment.first.freed_at
            for segment in self.segments.values()
            if segment.pool == DEFAULT_POOL and not segment.small and segment.free
        }
        while over > 0 and whole:
            mean = sum(whole.values()) / len(whole)
            for address, age in list(whole.items()):
                if age >= mean:
                    over -= self.segments[address].size
                    self.release(self.segments[address])
                    del whole[address]

    def _release_oversize(self, key: tuple[Pool, bool, int], size: int) -> None:
        """Return free blocks that are too large to split: one that is enough, or the largest."""
        most = self.settings.max_split_size
        if most is None:
            return
        free = self.free_blocks[key]
        size = max(size, most)
        position = bisect_left(free, (size,))
        if position < len(free):
            self.release(self.at[free[position][-1]].segment)
            return
        while size > 0 and free and free[-1][0] >= most:
            size -= free[-1][0]
            self.release(self.at[free[-1][-1]].segment)

    def keep(self, block: Block) -> None:
        """Put a block on the free list."""
        segment = block.segment
        block.freed_at = self.requests.get((segment.pool, segment.small), 0)
        free = self.free_blocks.setdefault(segment.key, [])
        insort(free, block.place)
        self.at[block.address] = block

    def take(self, block: Block) -> None:
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
    allocator: CachingAllocator | None = None,
) -> Replay:
    """Run `events` through the allocator.

    Args:
        limit: bytes that may be reserved: the device's memory minus the CUDA context and what other
            processes hold. None: no limit.
        stream: gives the stream of an allocation; by default the event's own.
        allocator: an unused one; None: one with PyTorch's default settings.

    Raises:
        OutOfMemory: a request does not fit in `limit`; the exception names it.
    """
    allocator = allocator or CachingAllocator(limit)
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
