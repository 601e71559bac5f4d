"""The state of CUDA's allocator at one moment of a history, and its model in that state."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ds_cmli.allocator.allocator import CachingAllocator
from ds_cmli.allocator.blocks import DEFAULT_POOL, DEFAULTS, Block, Pool, Segment, Settings, rounded
from ds_cmli.allocator.expandable import ExpandableAllocator, Key

Record = dict[str, Any]  # a segment, block, event or stack frame in a snapshot
Snapshot = dict[str, Any]  # as `torch.cuda.memory._snapshot()` returns it
Trace = list[Record]  # the history of one device in it


class Entry(NamedTuple):
    """One event of a recorded history."""

    action: str
    address: int
    size: int  # of an allocation or a free: the requested bytes
    stream: int
    pool: Pool | None  # None: the history does not record it


def entries(trace: Trace) -> list[Entry]:
    return list(map(_entry, trace))


def _entry(event: Record) -> Entry:
    pool = event.get("pool_id") or None
    if pool is not None:
        pool = tuple(pool)
    address, size, stream = event.get("addr", 0), event.get("size", 0), event.get("stream", 0)
    return Entry(event["action"], address, size, stream, pool)


@dataclass(frozen=True)
class Mapped:
    """Addresses that are backed by memory: a segment, or a part of an expandable segment."""

    size: int
    stream: int
    small: bool
    pool: Pool = DEFAULT_POOL
    # The number of the event that returned the memory to the device, if its pool is not recorded.
    released: int | None = None

    @property
    def key(self) -> Key:
        return self.pool, self.small, self.stream


@dataclass(eq=False)
class SegmentRange:
    """The known addresses of an expandable segment, as long as it has memory."""

    begin: int
    end: int
    small: bool
    stream: int
    pool: Pool = DEFAULT_POOL
    first: int = 0  # number of the first event that maps memory; -1: there was memory before
    last: int = 0  # number of the last event
    uses: int = 0  # number of events

    @property
    def key(self) -> Key:
        return self.pool, self.small, self.stream

    def holds(self, address: int) -> bool:
        return self.begin <= address < self.end


@dataclass
class State:
    """The allocator's state at the first event, and what the history records of later segments."""

    segments: dict[int, Mapped] = field(default_factory=dict)  # by address
    live: dict[int, int] = field(default_factory=dict)  # address of a used block -> requested bytes
    sizes: dict[int, int] = field(default_factory=dict)  # the sizes of live blocks that are known
    # Address of each live block -> (least, most) bytes of its remainder, see `beginning`.
    remainders: dict[int, tuple[int, int]] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)  # of segments, where they are not 0
    taken: dict[int, Mapped] = field(default_factory=dict)  # number of a `segment_alloc` -> segment
    settings: Settings = DEFAULTS  # with which the history was recorded
    ranges: list[SegmentRange] = field(default_factory=list)  # those that have memory
    # Number of each `segment_map` and `segment_unmap` -> its range.
    range_at: dict[int, SegmentRange] = field(default_factory=dict)
    # Number of each event that returned memory whose pool is not recorded -> the assumed pool.
    assumed_pools: dict[int, Pool] = field(default_factory=dict)
    private: set[int] = field(default_factory=set)  # those that cannot be of the default pool

    def rounded(self, requested: int) -> int:
        return rounded(requested, self.settings.roundup_power2_divisions)

    def pools(self) -> set[Pool]:
        """The pools of all segments of the history, as recorded or assumed."""
        mapped = [*self.segments.values(), *self.taken.values()]
        return {*self.assumed_pools.values(), *(part.pool for part in mapped)}

    def with_pools(self, pools: dict[int, Pool], private: set[int]) -> "State":
        """Copy the state, with the segments that the events `pools` released in these pools."""
        return replace(
            self,
            segments=_in_pools(self.segments, pools),
            taken=_in_pools(self.taken, pools),
            remainders=dict(self.remainders),
            assumed_pools=self.assumed_pools | pools,
            private=private,
        )


def _in_pools(mapped: dict[int, Mapped], pools: dict[int, Pool]) -> dict[int, Mapped]:
    out = dict(mapped)
    for key, part in mapped.items():
        if part.released in pools:
            out[key] = replace(part, pool=pools[part.released])
    return out


def range_with(ranges: Sequence[SegmentRange], address: int) -> SegmentRange | None:
    return next((known for known in ranges if known.holds(address)), None)


def joined(state: State) -> dict[int, Mapped]:
    """`state.segments`, with adjacent mapped parts of an expandable segment joined."""
    if not state.settings.expandable_segments:
        return state.segments
    out: dict[int, Mapped] = {}
    last = -1
    for address, part in sorted(state.segments.items()):
        if last in out and last + out[last].size == address and out[last].key == part.key:
            out[last] = replace(out[last], size=out[last].size + part.size)
        else:
            out[address] = part
            last = address
    return out


def restore(state: State) -> tuple[CachingAllocator, dict[int, Block]]:
    """Put the allocator's model into `state`. Returns the model, and its used blocks by address."""
    live, blocks = sorted(state.live), {}
    allocator = CachingAllocator()
    if state.settings.expandable_segments:
        allocator = ExpandableAllocator()
    allocator.settings = state.settings
    for address, part in sorted(joined(state).items()):
        free = _add_memory(allocator, state, address, part)
        for start in live[bisect_left(live, address) : bisect_left(live, address + part.size)]:
            size = state.rounded(state.live[start]) + state.remainders[start][0]
            block = allocator.carve(free, start, size)
            blocks[start] = allocator.use(block, state.live[start])
            free = block
            if block.after is not None and block.after.free:
                free = block.after
    allocator.actions.clear()
    return allocator, blocks


def _add_memory(allocator: CachingAllocator, state: State, address: int, part: Mapped) -> Block:
    """Give the model the memory of `part`; returns it as one free block."""
    if isinstance(allocator, ExpandableAllocator):
        known = range_with(state.ranges, address)
        assert known is not None
        if known.begin not in allocator.segments:
            allocator.add_range(known.begin, part.key)
        return allocator.map_at(allocator.segments[known.begin], address, part.size)
    segment = Segment(address, part.size, part.stream, part.small, part.pool)
    segment.number = state.numbers.get(address, 0)
    allocator.segments[address] = segment
    allocator.reserved += part.size
    allocator.keep(segment.first)
    return segment.first
