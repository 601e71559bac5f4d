"""A model of CUDA's caching allocator with `expandable_segments:True`.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp`, torch 2.13. They differ from those in
`allocator` in five points:
 1. Each pool of each stream reserves one range of addresses, which is larger than the device's
    memory. Memory is mapped into it in pieces of 2 MiB (small pool) or 20 MiB (large pool).
 2. If no free block is large enough, memory is mapped into the lowest part of the range that is
    unused (unmapped, with the free memory in front of it) and large enough. As many pieces are
    mapped as are missing.
 3. The allocator starts from the smallest free block that is large enough. As long as the next
    larger one has less room to grow to (its own size plus the unmapped addresses behind it), it
    takes that one instead.
 4. The remainder of a block is split off if it has at least 512 B, in both pools.
 5. If the device has no room, all wholly free pieces are unmapped, wherever they lie. A range
    without memory is given up.
"""

from bisect import insort
from operator import attrgetter

from ds_cmli.allocator.allocator import CachingAllocator
from ds_cmli.allocator.blocks import (
    DEFAULT_POOL,
    DEFAULTS,
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL_SEGMENT,
    Action,
    Block,
    Event,
    Place,
    Pool,
    Segment,
    Settings,
    join,
    split,
)

ADDRESS_SPACE = LARGE_SEGMENT << 16  # bytes of a range: 1.4 TB, more than any device has
Key = tuple[Pool, bool, int]  # (pool, small, stream)


class ExpandableAllocator(CachingAllocator):
    """The model. Its segments are the ranges of addresses; `reserved` counts the mapped bytes."""

    def __init__(self, limit: int | None = None, settings: Settings = DEFAULTS):
        super().__init__(limit, settings)
        self.unmapped: dict[Key, list[Block]] = {}  # each pool's unmapped blocks, by address

    def add_range(self, address: int, key: Key, size: int = ADDRESS_SPACE) -> Segment:
        """Add a range of addresses, all of it unmapped."""
        pool, small, stream = key
        segment = self.number(Segment(address, size, stream, small, pool))
        segment.first.mapped = False
        self.segments[address] = segment
        self._keep_unmapped(segment.first)
        return segment

    def map(self, block: Block, size: int, event: Event | None = None) -> Block | None:
        """Map pieces into the first `size` bytes of an unmapped block, and merge free neighbours.

        Returns the free block that results, or None if the device has no room.
        """
        piece = piece_bytes(block.segment)
        size = -(-size // piece) * piece
        if self.limit is not None and self.reserved + size > self.limit:
            return None
        self._take_unmapped(block)
        if size < block.size:
            rest = split(block, block.address + size)
            rest.mapped = False
            self._keep_unmapped(rest)
        block.mapped = True
        self.reserved += size
        self.actions.append(Action("segment_map", block.address, size, block.segment.stream, event))
        return self._merge(block)

    def map_at(self, segment: Segment, address: int, size: int) -> Block:
        """Map `size` bytes at an address of the range `segment` that is unmapped."""
        block = segment.first
        while block.address + block.size <= address:
            assert block.after is not None
            block = block.after
        if block.address < address:
            self._take_unmapped(block)
            rest = split(block, address)
            rest.mapped = False
            self._keep_unmapped(block)
            self._keep_unmapped(rest)
            block = rest
        mapped = self.map(block, size)
        assert mapped is not None
        return mapped

    def unmap(self, block: Block) -> None:
        """Unmap all pieces that lie wholly in a free block: the device gets their memory back."""
        segment, piece = block.segment, piece_bytes(block.segment)
        begin = segment.address + -(-(block.address - segment.address) // piece) * piece
        end = segment.address + (block.address + block.size - segment.address) // piece * piece
        if begin >= end:
            return
        self.take(block)
        if end < block.address + block.size:
            self.keep(split(block, end))
        if begin > block.address:
            rest = split(block, begin)
            self.keep(block)
            block = rest
        block.mapped = False
        self.reserved -= end - begin
        self.actions.append(Action("segment_unmap", begin, end - begin, segment.stream, None))
        before, after = block.before, block.after
        if before is not None and not before.mapped:
            self._take_unmapped(before)
            block = join(before, block)
        if after is not None and not after.mapped:
            self._take_unmapped(after)
            block = join(block, after)
        if block.before is None and block.after is None:
            del self.segments[segment.address]
        else:
            self._keep_unmapped(block)

    def unmap_at(self, address: int, size: int) -> bool:
        """Unmap the free block at an address.

        Returns whether exactly [address, address + size) was unmapped.
        """
        for block in self.at.values():
            if block.address <= address < block.address + block.size:
                self.unmap(block)
                done = self.actions[-1]
                return (done.name, done.address, done.bytes) == ("segment_unmap", address, size)
        return False

    def empty_cache(self, pool: Pool = DEFAULT_POOL) -> None:
        for block in list(self.at.values()):
            if block.segment.pool == pool:
                self.unmap(block)

    def _best_fit(self, free: list[Place], size: int) -> int:
        position = super()._best_fit(free, size)
        while position + 1 < len(free):
            if self._can_grow_to(free[position + 1]) >= self._can_grow_to(free[position]):
                break
            position += 1
        return position

    def _can_grow_to(self, entry: Place) -> int:
        block = self.at[entry[-1]]
        if block.after is None or block.after.mapped:
            return block.size
        return block.size + block.after.size

    def splits(self, left: int, size: int, small: bool) -> bool:
        return left >= MIN_BLOCK

    def _from_device(self, requested: int, size: int, key: Key, event: Event | None) -> Block:
        block = self._mapped(size, key, event)
        if block is None:
            self.empty_cache()
            block = self._mapped(size, key, event)
        if block is None:
            missing = self._missing_pieces(self._stretch(size, key), size)
            raise self._out_of_memory(requested, missing, event)
        self.take(block)
        return block

    def _mapped(self, size: int, key: Key, event: Event | None) -> Block | None:
        block: Block | None = self._stretch(size, key)
        assert block is not None
        if not block.mapped:
            block = self.map(block, min(block.size, size), event)
        while block is not None and block.size < size:
            assert block.after is not None
            block = self.map(block.after, min(size - block.size, block.after.size), event)
        return block

    def _stretch(self, size: int, key: Key) -> Block:
        """The free or unmapped block where rule 2 finds `size` bytes, maybe in a new range."""
        for block in self.unmapped.setdefault(key, []):
            if block.before is not None and block.before.free:
                block = block.before
            room, at = 0, block
            while room < size and at is not None and not at.requested:
                room += at.size
                at = at.after  # type: ignore[assignment]
            if room >= size:
                return block
        segment = self.add_range(self.next_address, key)
        self.next_address += ADDRESS_SPACE
        return segment.first

    def _missing_pieces(self, block: Block, size: int) -> int:
        piece, taken, at = piece_bytes(block.segment), 0, block
        while size > 0:
            if not at.mapped:
                taken += -(-min(size, at.size) // piece) * piece
            size -= at.size
            at = at.after  # type: ignore[assignment]
        return taken

    def _keep_unmapped(self, block: Block) -> None:
        blocks = self.unmapped.setdefault(block.segment.key, [])
        insort(blocks, block, key=attrgetter("address"))

    def _take_unmapped(self, block: Block) -> None:
        self.unmapped[block.segment.key].remove(block)


def piece_bytes(segment: Segment) -> int:
    """Rule 1: the bytes of one piece."""
    return SMALL_SEGMENT if segment.small else LARGE_SEGMENT
