"""Blocks and segments of CUDA's caching allocator, its constants and its settings.

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
# The id of a memory pool, as in `torch.cuda.MemPool.id`; a CUDA graph's pool has one too.
Pool = tuple[int, int]
DEFAULT_POOL = (0, 0)


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


@dataclass(frozen=True)
class Settings:
    """Settings of PYTORCH_ALLOC_CONF, with sizes in bytes. By default everything is off."""

    # A block of this size or more is not split. It serves no request below this size, and only
    # requests that are less than 20 MiB smaller than the block.
    max_split_size: int | None = None
    # Requests are rounded up to this many steps between two powers of two.
    roundup_power2_divisions: int = 0
    # If more than this share of the limit is reserved when a new segment is needed, wholly free
    # segments of the large pool that are at least as old as their mean are returned first.
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False  # modelled in `expandable`
    by_address: bool = False  # rule 3 as before torch 2.13; no setting of PyTorch's


DEFAULTS = Settings()


def rounded(requested: int, divisions: int = 0) -> int:
    """Rule 1; requests above `divisions` * 512 B follow roundup_power2_divisions, if it is on."""
    if divisions > 1 and requested > MIN_BLOCK * divisions:
        floor = 1 << (requested.bit_length() - 1)
        step = floor >> (divisions.bit_length() - 1)
        if requested == floor:
            return requested
        return -(-requested // step) * step
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
    freed_at: int = 0  # when it was freed, counted in requests to its pool until then
    mapped: bool = True  # False: address space of an expandable segment without memory behind it

    @property
    def free(self) -> bool:
        return not self.requested and self.mapped

    @property
    def place(self) -> Place:
        return self.size, self.segment.number, self.address


@dataclass(eq=False)
class Segment:
    """The memory that one call of cudaMalloc returned; in `expandable`, a range of addresses."""

    address: int
    size: int
    stream: int
    small: bool
    pool: Pool = DEFAULT_POOL
    first: Block = field(init=False)
    event: Event | None = None  # the allocation that needed a new segment
    number: int = 0  # in the order in which segments were taken; at most 0: before the history

    def __post_init__(self):
        self.first = Block(self, self.address, self.size)

    @property
    def key(self) -> tuple[Pool, bool, int]:
        return self.pool, self.small, self.stream

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

    # One of alloc, free_requested, free_completed, segment_alloc, segment_free, segment_map or
    # segment_unmap.
    name: str
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
