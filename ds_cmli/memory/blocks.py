"""Blocks and segments of CUDA's caching allocator, its sizes, and what PYTORCH_ALLOC_CONF changes of them.

The rules that the docstrings name are those of `allocator`.
"""

from dataclasses import dataclass, field

from ds_cmli.memory.report import Event

MIN_BLOCK = 512
SMALL_REQUEST = 1 << 20  # the largest of the small pool
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
MIN_LARGE_SEGMENT_REQUEST = 10 << 20  # from here on a request gets a segment of its own size
ROUND_SEGMENT = 2 << 20
FIRST_ADDRESS = 0x7F00_0000_0000
Pool = tuple[int, int]  # as `torch.cuda.MemPool.id`, and of a CUDA graph
DEFAULT_POOL = (0, 0)


@dataclass(frozen=True)
class Settings:
    """Of PYTORCH_ALLOC_CONF, in bytes; by default everything is off."""

    # A block from this size on is neither split nor given to a smaller request, nor to one smaller by 20 MiB or more.
    max_split_size: int | None = None
    roundup_power2_divisions: int = 0  # parts of each interval between powers of two that requests are rounded up to
    # Share of the limit from which on, before a new segment is taken, whole free ones older than their mean go back.
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False  # the model of which is `expandable`


DEFAULTS = Settings()


def rounded(requested: int, divisions: int = 0) -> int:
    """Rule 1; with `roundup_power2_divisions`, of what is larger than so many times 512 B."""
    if divisions > 1 and requested > MIN_BLOCK * divisions:
        floor = 1 << (requested.bit_length() - 1)
        step = floor >> (divisions.bit_length() - 1)
        return requested if requested == floor else -(-requested // step) * step
    return -(-requested // MIN_BLOCK) * MIN_BLOCK


def segment_bytes(size: int) -> int:
    """Rule 2: what is taken from the device for a rounded request."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < MIN_LARGE_SEGMENT_REQUEST:
        return LARGE_SEGMENT
    return -(-size // ROUND_SEGMENT) * ROUND_SEGMENT


class OutOfMemory(Exception):
    """The modelled device has no room: `requested` bytes were asked for, by `event`."""

    def __init__(self, requested: int, allocated: int, reserved: int, limit: int, missing: int, event: Event | None):
        super().__init__(
            f"{requested:,} bytes asked for with {reserved:,} of {limit:,} reserved, {allocated:,} of them allocated"
        )
        self.requested, self.allocated, self.reserved, self.limit = requested, allocated, reserved, limit
        self.missing, self.event = missing, event  # bytes that would have to go first


@dataclass(eq=False)
class Block:
    """A part of a segment, in use or free."""

    segment: "Segment"
    address: int
    size: int
    requested: int = 0  # 0: free
    event: Event | None = None  # of the allocation, while in use
    before: "Block | None" = None
    after: "Block | None" = None
    freed_at: int = 0  # number of requests to its pool by then
    mapped: bool = True  # False: address space of an expandable segment without memory behind it

    @property
    def free(self) -> bool:
        return not self.requested and self.mapped


@dataclass(eq=False)
class Segment:
    """What one call of cudaMalloc returned."""

    address: int
    size: int
    stream: int
    small: bool
    pool: Pool = DEFAULT_POOL
    first: Block = field(init=False)
    event: Event | None = None  # the one that needed it

    def __post_init__(self):
        self.first = Block(self, self.address, self.size)

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
    """What the allocator did, in the words of `torch.cuda.memory._record_memory_history`."""

    name: str  # segment_alloc, segment_free, alloc, free_requested, free_completed
    address: int
    bytes: int  # alloc and free: as requested
    stream: int
    event: Event | None


def split(block: Block, address: int) -> Block:
    """Divide a block at an address; returns the right part."""
    rest = Block(block.segment, address, block.address + block.size - address, before=block, after=block.after)
    if rest.after is not None:
        rest.after.before = rest
    block.size, block.after = address - block.address, rest
    return rest


def join(first: Block, second: Block) -> Block:
    """Two neighbouring blocks as the first of them."""
    first.size += second.size
    first.after = second.after
    if first.after is not None:
        first.after.before = first
    return first
