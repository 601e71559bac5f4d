"""The memory pools of a recorded history: whose memory a segment is.

CUDA graphs and `torch.cuda.MemPool` allocate in private pools, which share no memory with the
default pool. A snapshot records the pool of each segment that is there at its end, and of each
event where it was written by PyTorch 2.13 or later (`pool_id`). Without, the pool of a segment that
was returned to the device during the history is unknown. The requests can show it: where one was
not served from a free block that the allocator's rules prefer, that block was of another pool.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ds_cmli.allocator.blocks import (
    DEFAULT_POOL,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    Block,
    Pool,
    Segment,
)
from ds_cmli.allocator.state import Entry, Mapped, State, range_with, restore

Owner = int | Pool  # a segment of unknown pool, by the event that released it; or a known pool


class Recorded:
    """Follows the recorded segments through a history, event by event."""

    def __init__(self, start: State):
        self.start = start
        self.segments = dict(start.segments)  # by address
        self.order = sorted(start.segments)
        self.ranges = list(start.ranges)

    def follow(self, number: int, entry: Entry) -> None:
        address, size = entry.address, entry.size
        if entry.action == "segment_alloc" and address not in self.segments:
            pool = entry.pool or DEFAULT_POOL
            default = Mapped(size, entry.stream, size == SMALL_SEGMENT, pool)
            self.segments[address] = self.start.taken.get(number, default)
            insort(self.order, address)
        elif entry.action == "segment_free" and self.segments.pop(address, None) is not None:
            self.order.pop(bisect_left(self.order, address))
        own = self.start.range_at.get(number)
        if own is not None and own.first == number:
            self.ranges.append(own)
        if own is not None and own.last == number:
            self.ranges.remove(own)

    def segment(self, address: int) -> int | None:
        """The address of the segment in which an address lies."""
        position = bisect_right(self.order, address) - 1
        if position < 0:
            return None
        start = self.order[position]
        if address < start + self.segments[start].size:
            return start
        return None

    def pool(self, entry: Entry) -> Pool:
        """The pool that the address of an event belongs to."""
        if entry.pool is not None:
            return entry.pool
        if self.start.settings.expandable_segments:
            holder = range_with(self.ranges, entry.address)
            return DEFAULT_POOL if holder is None else holder.pool
        segment = self.segment(entry.address)
        if segment is None:
            return DEFAULT_POOL
        return self.segments[segment].pool

    def owner(self, address: int) -> Owner:
        segment = self.segment(address)
        if segment is None:
            return DEFAULT_POOL
        part = self.segments[segment]
        return part.pool if part.released is None else part.released


@dataclass
class Conflicts:
    """Which segments cannot have been in the same pool."""

    between: dict[Owner, set[Owner]] = field(default_factory=dict)
    # Segment of unknown pool -> event of its last allocation.
    last_used: dict[int, int] = field(default_factory=dict)

    def add(self, first: Owner, second: Owner) -> None:
        if first != second and (isinstance(first, int) or isinstance(second, int)):
            self.between.setdefault(first, set()).add(second)
            self.between.setdefault(second, set()).add(first)

    def of(self, owner: Owner) -> set[Owner]:
        return self.between.get(owner, set())


class _Placement:
    """Places every block at its recorded address, and notes the free blocks that CUDA skipped.

    One pool holds everything: what lies where does not depend on the pools. A free block whose true
    size is unknown, as it follows a block with an unknown remainder, counts only if `uncertain`.
    """

    def __init__(self, start: State, uncertain: bool):
        self.conflicts = Conflicts()
        self.start, self.recorded = start, Recorded(start)
        segments = {at: replace(part, pool=DEFAULT_POOL) for at, part in start.segments.items()}
        self.allocator, self.blocks = restore(replace(start, segments=segments))
        self.unused: set[int] = set()  # segments without an allocation so far
        # Block -> the bytes that its remainder may have beyond the least.
        self.spare: dict[int, int] = {}
        if not uncertain:
            for address, (least, most) in start.remainders.items():
                self.spare[address] = most - least

    def follow(self, number: int, entry: Entry) -> None:
        self.recorded.follow(number, entry)
        if entry.action == "segment_alloc":
            at, part = entry.address, self.recorded.segments[entry.address]
            segment = self.allocator.number(Segment(at, part.size, part.stream, part.small))
            self.allocator.segments[at] = segment
            self.allocator.keep(segment.first)
            self.unused.add(entry.address)
        elif entry.action == "segment_free" and entry.address in self.allocator.segments:
            for block in self.allocator.segments.pop(entry.address).blocks():
                if block.free:
                    self.allocator.take(block)
                self.blocks.pop(block.address, None)
            self.unused.discard(entry.address)
        elif entry.action == "free_completed" and entry.address in self.blocks:
            self.allocator.free(self.blocks.pop(entry.address))
            self.spare.pop(entry.address, None)
        elif entry.action == "alloc" and entry.size:
            self._allocate(number, entry)

    def _allocate(self, number: int, entry: Entry) -> None:
        address, needed = entry.address, self.start.rounded(entry.size)
        block = self.allocator.at.get(address) or self._around(address)
        if block is None or block.address + block.size < address + needed:
            return
        owner = self.recorded.owner(address)
        if isinstance(owner, int):
            self.conflicts.last_used[owner] = number
        for skipped in self._preferred(block, needed, entry.stream):
            self.conflicts.add(owner, self.recorded.owner(skipped.address))
        self.unused.discard(block.segment.address)
        left = block.address + block.size - address - needed
        size = needed
        if not self.allocator.splits(left, needed, block.segment.small):
            size += left
        carved = self.allocator.carve(block, address, size)
        self.blocks[address] = self.allocator.use(carved, entry.size)

    def _preferred(self, block: Block, needed: int, stream: int) -> Iterator[Block]:
        """Yield the free blocks that the rules prefer to `block` for `needed` bytes."""
        allocator = self.allocator
        key = DEFAULT_POOL, needed <= SMALL_REQUEST, stream
        free = allocator.free_blocks.get(key, [])
        fresh = block.segment.address in self.unused
        for place in free[bisect_left(free, (needed,)) :]:
            if not fresh and place >= block.place:
                break
            other = allocator.at[place[-1]]
            unsure = 0 if other.before is None else self.spare.get(other.before.address, 0)
            if (
                other.segment is not block.segment
                and other.segment.address not in self.unused
                and other.size - unsure >= needed
                and allocator.may_use(other.size, needed)
            ):
                yield other

    def _around(self, address: int) -> Block | None:
        """The free block that an address lies in, behind its beginning."""
        for block in self.allocator.at.values():
            if block.address < address < block.address + block.size:
                return block
        return None


def conflicts(start: State, trace: list[Entry], uncertain: bool) -> Conflicts:
    placement = _Placement(start, uncertain)
    for number, entry in enumerate(trace):
        placement.follow(number, entry)
    return placement.conflicts


def infer_pools(
    start: State, trace: list[Entry], uncertain: bool
) -> tuple[dict[int, Pool], set[int]]:
    """Find the private pools that the requests of the history need, as few as possible.

    Returns the pool of each segment found to be in one, by the event that released the segment; and
    those of them for which the history leaves no choice, as the default pool's own segments rule
    them out. `uncertain` as in `_Placement`.
    """
    mismatches = conflicts(start, trace, uncertain)
    unknown = set(start.assumed_pools)
    forced = {segment for segment in unknown if DEFAULT_POOL in mismatches.of(segment)}
    private = set(forced)
    undecided: dict[int, set[Owner]] = {}
    for segment in unknown - forced:
        undecided[segment] = (mismatches.of(segment) & unknown) - forced
    # Of two that exclude each other, at most one is the default pool's.
    late = _returned_late(trace)

    def likelihood(segment: int) -> tuple[bool, int, int]:
        return segment in late, len(undecided[segment]), segment

    while any(undecided.values()):
        likeliest = max(filter(undecided.get, undecided), key=likelihood)
        private.add(likeliest)
        for other in undecided.pop(likeliest):
            assert isinstance(other, int)
            undecided[other].discard(likeliest)
    returned_while_used = start.settings.max_split_size is not None
    return _grouped(private, mismatches, returned_while_used), forced


@dataclass
class PrivatePool:
    """A private pool that is assumed."""

    id: Pool
    returned: int  # number of the event that returned the first of its segments
    last_used: int = -1  # number of the last allocation in it
    excluded: set[Owner] = field(default_factory=set)  # what cannot be in it


def _grouped(private: set[int], wrong: Conflicts, returned_while_used: bool) -> dict[int, Pool]:
    """Put the segments into as few private pools as possible: each into the first that can hold it.

    PyTorch returns a private pool's segments when nothing can allocate in it any more. With a split
    size, it also returns some of them in between.
    """
    out: dict[int, Pool] = {}
    pools: list[PrivatePool] = []
    for segment in sorted(private):
        last_used = wrong.last_used.get(segment, -1)
        for pool in pools:
            used_after_return = pool.last_used >= segment or last_used >= pool.returned
            if segment not in pool.excluded and (returned_while_used or not used_after_return):
                break
        else:
            pool = PrivatePool((-1, len(pools)), returned=segment)
            pools.append(pool)
        pool.excluded |= wrong.of(segment)
        pool.last_used = max(pool.last_used, last_used)
        out[segment] = pool.id
    return out


def _returned_late(trace: list[Entry]) -> set[int]:
    """The events that return a segment where, going by their order, it is a private pool's turn.

    `empty_cache` returns the default pool's large segments, then its small ones, each by stream,
    size and address; then those of the private pools that are no longer in use. This is only a
    hint: two calls in a row look like one.
    """
    out: set[int] = set()
    last: tuple[int, ...] = ()
    for number, entry in enumerate(trace):
        if entry.action != "segment_free":
            last = ()
            continue
        turn = entry.size == SMALL_SEGMENT, entry.stream, entry.size, entry.address
        if number - 1 in out or turn < last:
            out.add(number)
        last = turn
    return out
