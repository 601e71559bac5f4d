"""The memory pools of a recorded history: whose memory a segment is.

CUDA graphs and `torch.cuda.MemPool` allocate in private pools, which share no memory with the default pool. A snapshot
tells the pool of each segment that is there at its end, and of each event where it was written by PyTorch 2.13 or later
(`pool_id`). Without, the pool of a segment that was returned to the device during the history is unknown. The requests
can tell: where one was not served from a free block that the allocator's rules prefer, that block was of another pool.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ds_cmli.allocator.blocks import (
    DEFAULT_POOL,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    Block,
    Pool,
    Segment,
)
from ds_cmli.allocator.state import Mapped, State, recorded_pool, restore

Owner = int | Pool  # a segment of unknown pool, by the event that released it; or a known pool


class Recorded:
    """Follows the recorded segments through a history, event by event."""

    def __init__(self, start: State):
        self.start, self.parts, self.order = start, dict(start.segments), sorted(start.segments)
        self.ranges = list(start.ranges)

    def follow(self, number: int, entry: dict[str, Any]) -> None:
        address, size = entry.get("addr", 0), entry.get("size", 0)
        if entry["action"] == "segment_alloc" and address not in self.parts:
            default = Mapped(
                size,
                entry.get("stream", 0),
                size == SMALL_SEGMENT,
                recorded_pool(entry) or DEFAULT_POOL,
            )
            self.parts[address] = self.start.taken.get(number, default)
            insort(self.order, address)
        elif entry["action"] == "segment_free" and self.parts.pop(address, None) is not None:
            self.order.pop(bisect_left(self.order, address))
        found = self.start.range_at.get(number)
        if found is not None and found.first == number:
            self.ranges.append(found)
        if found is not None and found.last == number:
            self.ranges.remove(found)

    def segment(self, address: int) -> int | None:
        """The address of the segment in which an address lies."""
        position = bisect_right(self.order, address) - 1
        if position < 0 or address >= self.order[position] + self.parts[self.order[position]].size:
            return None
        return self.order[position]

    def pool(self, entry: dict[str, Any]) -> Pool:
        """The pool that the address of an event belongs to."""
        told, address = recorded_pool(entry), entry.get("addr", 0)
        if told is not None:
            return told
        if self.start.settings.expandable_segments:
            found = next(
                (found for found in self.ranges if found.begin <= address < found.end), None
            )
            return DEFAULT_POOL if found is None else found.pool
        segment = self.segment(address)
        return DEFAULT_POOL if segment is None else self.parts[segment].pool


@dataclass
class Conflicts:
    """Which segments cannot have been in the same pool."""

    between: dict[Owner, set[Owner]] = field(default_factory=dict)
    last_used: dict[int, int] = field(
        default_factory=dict
    )  # segment of unknown pool -> event of its last allocation

    def add(self, first: Owner, second: Owner) -> None:
        if first != second and (isinstance(first, int) or isinstance(second, int)):
            self.between.setdefault(first, set()).add(second)
            self.between.setdefault(second, set()).add(first)


@dataclass
class PrivatePool:
    """A private pool that is assumed."""

    id: Pool
    returned: int  # number of the event that returned the first of its segments
    last_used: int = -1  # number of the last allocation in it
    excluded: set[Owner] = field(default_factory=set)  # what cannot be in it


def conflicts(start: State, trace: list[dict[str, Any]], uncertain: bool = False) -> Conflicts:
    """Place every block at its recorded address, and note the free blocks that should have been taken instead.

    A free block whose true size is unknown, as it follows a block with an unknown rest, counts only if `uncertain`.
    """
    out = Conflicts()
    # One pool holds everything: what lies where does not depend on the pools.
    everything = replace(
        start, segments={a: replace(part, pool=DEFAULT_POOL) for a, part in start.segments.items()}
    )
    allocator, blocks = restore(everything)
    recorded, unused = Recorded(start), set()
    spare = {} if uncertain else {a: most - least for a, (least, most) in start.rests.items()}
    for number, entry in enumerate(trace):
        action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
        recorded.follow(number, entry)
        if action == "segment_alloc":
            taken = recorded.parts[address]
            segment = allocator.segments[address] = Segment(
                address, taken.size, taken.stream, taken.small
            )
            allocator.keep(segment.first)
            unused.add(address)
        elif action == "segment_free" and address in allocator.segments:
            for part in allocator.segments.pop(address).blocks():
                if part.free:
                    allocator.take(part)
                blocks.pop(part.address, None)
            unused.discard(address)
        elif action == "free_completed" and address in blocks:
            allocator.free(blocks.pop(address))
            spare.pop(address, None)
        elif action == "alloc" and size:
            block = allocator.at.get(address) or _around(allocator.at, address)
            needed = start.rounded(size)
            if block is None or block.address + block.size < address + needed:
                continue
            mine = _owner_of(recorded, address)
            if isinstance(mine, int):
                out.last_used[mine] = number
            fresh = block.segment.address in unused
            unused.discard(block.segment.address)
            small, stream = needed <= SMALL_REQUEST, entry.get("stream", 0)
            free = allocator.free_blocks.get((DEFAULT_POOL, small, stream), [])
            for at in range(bisect_left(free, (needed, 0)), len(free)):
                if not fresh and free[at] >= (block.size, block.address):
                    break
                other = allocator.at[free[at][1]]
                too_much = spare.get(other.before.address, 0) if other.before is not None else 0
                if (
                    other.segment is not block.segment
                    and other.segment.address not in unused
                    and other.size - too_much >= needed
                    and allocator.may_use(other.size, needed)
                ):
                    out.add(mine, _owner_of(recorded, other.address))
            left = block.address + block.size - address - needed
            whole = needed if allocator.splits(left, needed, block.segment.small) else needed + left
            blocks[address] = allocator.use(allocator.carve(block, address, whole), size)
    return out


def _around(free: dict[int, Block], address: int) -> Block | None:
    return next(
        (block for block in free.values() if block.address < address < block.address + block.size),
        None,
    )


def _owner_of(recorded: Recorded, address: int) -> Owner:
    segment = recorded.segment(address)
    if segment is None:
        return DEFAULT_POOL
    part = recorded.parts[segment]
    return part.pool if part.released is None else part.released


def told_apart(
    start: State, trace: list[dict[str, Any]], uncertain: bool = False
) -> tuple[dict[int, Pool], set[int]]:
    """The private pools that the requests of the history need, as few as possible.

    Returns the pool of each segment found to be in one, by the event that released the segment; and those of them for
    which the history leaves no choice, as the default pool's own segments rule them out.
    """
    found = conflicts(start, trace, uncertain)
    unknown = set(start.untold)
    forced = {segment for segment in unknown if DEFAULT_POOL in found.between.get(segment, ())}
    private = set(forced)
    open_ = {
        segment: {o for o in found.between.get(segment, ()) if o in unknown} - forced
        for segment in unknown - forced
    }
    # Of two that exclude each other, at most one is the default pool's.
    late = _returned_late(trace)
    while any(open_.values()):
        most = max(
            filter(open_.get, open_),
            key=lambda segment: (segment in late, len(open_[segment]), segment),
        )
        private.add(most)
        for other in open_.pop(most):
            open_[other].discard(most)
    return dict(_grouped(private, found, start.settings.max_split_size is not None)), forced


def _grouped(
    private: set[int], found: Conflicts, returned_while_used: bool
) -> Iterator[tuple[int, Pool]]:
    """Put the segments into as few private pools as possible: the first one in which each can have been.

    PyTorch returns a private pool's segments when nothing can allocate in it any more. With a split size, it also
    returns some of them in between.
    """
    pools: list[PrivatePool] = []
    for segment in sorted(private):
        last_used = found.last_used.get(segment, -1)
        for pool in pools:
            used_after_return = pool.last_used >= segment or last_used >= pool.returned
            if segment not in pool.excluded and (returned_while_used or not used_after_return):
                break
        else:
            pool = PrivatePool((-1, len(pools)), returned=segment)
            pools.append(pool)
        pool.excluded |= found.between.get(segment, set())
        pool.last_used = max(pool.last_used, last_used)
        yield segment, pool.id


def _returned_late(trace: list[dict[str, Any]]) -> set[int]:
    """The events that return a segment where, going by their order, it is a private pool's turn.

    `empty_cache` returns the default pool's large segments, then its small ones, each by stream, size and address; then
    those of the private pools that are no longer in use. This is only a hint: two calls in a row look like one.
    """
    out: set[int] = set()
    last: tuple[int, ...] = ()
    for number, entry in enumerate(trace):
        if entry["action"] != "segment_free":
            last = ()
            continue
        size = entry.get("size", 0)
        turn = size == SMALL_SEGMENT, entry.get("stream", 0), size, entry.get("addr", 0)
        if number - 1 in out or turn < last:
            out.add(number)
        last = turn
    return out
