"""Blocks and segments of CUDA's caching allocator, and its constants.

"Rule 1" and so on are the rules listed in the docstring of `allocator`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

MIN_BLOCK = 512
SMALL_REQUEST = 1 << 20  # the largest request that the small pool serves
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
MIN_LARGE_SEGMENT_REQUEST = 10 << 20  # from here on a request gets a segment of its own size
ROUND_SEGMENT = 2 << 20
FIRST_ADDRESS = 0x7F00_0000_0000


@dataclass(frozen=True)
class Event:
    """The allocation or the free of a block; of 0 bytes: the return of all free segments.

    Lists of events are in the order in which they happened.
    """

    block: int  # the same number at the allocation and at the free of a block; not used again
    bytes: int  # requested bytes: positive at the allocation, the same number negative at the free
    category: str  # what the block is for
    phase: str  # the part of a step in which it happened
    op: str = ""  # the operator that allocated the block
    stream: int = 0  # for which the block was allocated; 0: the default one


def live_at_peak(events: Sequence[Event]) -> list[Event]:
    """The allocations that are live when the requested bytes are the most, in their order."""
    total = most = end = 0
    for number, event in enumerate(events):
        total += event.bytes
        if total > most:
            most, end = total, number + 1
    live: dict[int, Event] = {}
    for event in events[:end]:
        if event.bytes > 0:
            live[event.block] = event
        elif event.bytes < 0:
            del live[event.block]
    return list(live.values())


def peaks_of_phases(events: Sequence[Event]) -> dict[str, int]:
    """The most that is requested in each phase, what was live when it began included."""
    total, most = 0, dict[str, int]()
    for event in events:
        before, total = total, total + event.bytes
        most[event.phase] = max(most.get(event.phase, 0), before, total)
    return most


def rounded(requested: int) -> int:
    """Rule 1."""
    return -(-requested // MIN_BLOCK) * MIN_BLOCK


def segment_bytes(size: int) -> int:
    """Rule 2: the size of the segment that is taken from the device for a rounded request."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < MIN_LARGE_SEGMENT_REQUEST:
        return LARGE_SEGMENT
    return -(-size // ROUND_SEGMENT) * ROUND_SEGMENT


@dataclass(eq=False)
class OutOfMemory(Exception):
    """The modelled device has no room for the `requested` bytes that `event` asked for."""

    requested: int
    allocated: int
    reserved: int
    limit: int
    missing: int  # bytes that would have to be freed first
    event: Event | None

    def __str__(self) -> str:
        return (
            f"{self.requested:,} bytes asked for with {self.reserved:,} of {self.limit:,} "
            f"reserved, {self.allocated:,} of them allocated"
        )


Place = tuple[int, ...]  # of a free block: its size, its segment's number, its address


@dataclass(eq=False)
class Block:
    """A part of a segment, in use or free."""

    segment: "Segment"
    address: int
    size: int
    requested: int = 0  # 0: free
    event: Event | None = None  # the allocation, while the block is in use
    before: "Block | None" = None
    after: "Block | None" = None

    @property
    def free(self) -> bool:
        return not self.requested

    @property
    def place(self) -> Place:
        return self.size, self.segment.number, self.address


@dataclass(eq=False)
class Segment:
    """The memory that one call of cudaMalloc returned."""

    address: int
    size: int
    stream: int
    small: bool
    first: Block = field(init=False)
    event: Event | None = None  # the allocation that needed a new segment
    number: int = 0  # in the order in which segments were taken

    def __post_init__(self):
        self.first = Block(self, self.address, self.size)

    @property
    def key(self) -> tuple[bool, int]:
        return self.small, self.stream

    @property
    def free(self) -> bool:
        return not self.first.requested and self.first.after is None

    def blocks(self) -> list[Block]:
        out, block = [], self.first
        while block is not None:
            out.append(block)
            block = block.after  # type: ignore[assignment]
        return out


@dataclass(frozen=True)
class Action:
    """One action of the allocator, named as in `torch.cuda.memory._record_memory_history`."""

    name: str  # one of alloc, free_requested, free_completed, segment_alloc and segment_free
    address: int
    bytes: int  # for alloc and free_*: the requested bytes
    stream: int
    event: Event | None


def split(block: Block, address: int) -> Block:
    """Split a block at an address. Returns the right part; `block` becomes the left one."""
    end = block.address + block.size
    rest = Block(block.segment, address, end - address, before=block, after=block.after)
    if rest.after is not None:
        rest.after.before = rest
    block.size, block.after = address - block.address, rest
    return rest


def join(first: Block, second: Block) -> Block:
    """Merge two neighbouring blocks into the first one, and return it."""
    first.size += second.size
    first.after = second.after
    if first.after is not None:
        first.after.before = first
    return first
