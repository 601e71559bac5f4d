"""The state of CUDA's allocator at one moment of a recorded history, and its model put into that state."""

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Any

from ds_cmli.allocator.allocator import CachingAllocator
from ds_cmli.allocator.blocks import DEFAULT_POOL, DEFAULTS, Block, Pool, Segment, Settings, rounded
from ds_cmli.allocator.expandable import ExpandableAllocator, Key


@dataclass(frozen=True)
class Mapped:
    """A range of addresses that is backed by memory: a segment, or a part of an expandable segment."""

    size: int
    stream: int
    small: bool
    pool: Pool = DEFAULT_POOL
    released: int | None = (
        None  # number of the event in `State.untold` that returned the segment to the device
    )

    @property
    def key(self) -> Key:
        return self.pool, self.small, self.stream


@dataclass(eq=False)
class Range:
    """The addresses that a history names of an expandable segment, from its first memory until it has none left."""

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


@dataclass
class State:
    """The state of the allocator at the first event, with what the history tells about later segments."""

    segments: dict[int, Mapped] = field(default_factory=dict)  # by address
    live: dict[int, int] = field(
        default_factory=dict
    )  # address of each block in use -> requested bytes
    sizes: dict[int, int] = field(
        default_factory=dict
    )  # address -> block's size, for live blocks where it is known
    rests: dict[int, tuple[int, int]] = field(
        default_factory=dict
    )  # block -> (least, most) bytes of its rest
    taken: dict[int, Mapped] = field(
        default_factory=dict
    )  # number of each `segment_alloc` -> the segment
    settings: Settings = DEFAULTS  # with which the history was recorded
    ranges: list[Range] = field(default_factory=list)  # those that have memory
    range_at: dict[int, Range] = field(
        default_factory=dict
    )  # number of each `segment_map` and `_unmap` -> its range
    # Number of each event that returned memory to the device whose pool the history does not tell -> the assumed pool.
    untold: dict[int, Pool] = field(default_factory=dict)
    private: set[int] = field(
        default_factory=set
    )  # those of them that cannot be of the default pool

    def rounded(self, requested: int) -> int:
        return rounded(requested, self.settings.roundup_power2_divisions)

    def parts(self) -> list[Mapped]:
        """Every segment of the history."""
        return [*self.segments.values(), *self.taken.values()]

    def with_pools(self, pools: dict[int, Pool], private: set[int]) -> "State":
        """A copy in which the segments that were released by the events `pools` are in these pools."""

        def changed(parts: dict[int, Mapped]) -> dict[int, Mapped]:
            return {
                key: replace(part, pool=pools[part.released]) if part.released in pools else part
                for key, part in parts.items()
            }

        segments, taken = changed(self.segments), changed(self.taken)
        untold = self.untold | pools
        return replace(
            self,
            segments=segments,
            taken=taken,
            rests=dict(self.rests),
            untold=untold,
            private=private,
        )


def recorded_pool(entry: dict[str, Any]) -> Pool | None:
    """The pool that an event tells, if it tells one."""
    return tuple(entry["pool_id"]) if entry.get("pool_id") else None  # type: ignore[return-value]


def joined(state: State) -> dict[int, Mapped]:
    """`state.segments`, with adjacent mapped ranges of an expandable segment joined."""
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
    """Put the allocator's model into `state`. Returns the model, and its blocks in use by address."""
    live, blocks = sorted(state.live), {}
    allocator = ExpandableAllocator() if state.settings.expandable_segments else CachingAllocator()
    allocator.settings = state.settings
    for address, part in sorted(joined(state).items()):
        if isinstance(allocator, ExpandableAllocator):
            start = next(
                found.begin for found in state.ranges if found.begin <= address < found.end
            )
            if start not in allocator.segments:
                allocator.add_range(start, part.key)
            free = allocator.map_at(allocator.segments[start], address, part.size)
        else:
            segment = Segment(address, part.size, part.stream, part.small, part.pool)
            allocator.segments[address] = segment
            allocator.reserved += part.size
            free = segment.first
            allocator.keep(free)
        for start in live[bisect_left(live, address) : bisect_left(live, address + part.size)]:
            block = allocator.carve(
                free, start, state.rounded(state.live[start]) + state.rests[start][0]
            )
            blocks[start] = allocator.use(block, state.live[start])
            free = block.after if block.after is not None and block.after.free else block
    allocator.actions.clear()
    return allocator, blocks
