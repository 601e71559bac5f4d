"""Recorded histories of random programs, made by the allocator's model."""

import random
from typing import Any

from ds_cmli.allocator import snapshot
from ds_cmli.allocator.allocator import CachingAllocator, Replay
from ds_cmli.allocator.blocks import DEFAULT_POOL, DEFAULTS, FIRST_ADDRESS, OutOfMemory, Pool, Settings, segment_bytes
from ds_cmli.allocator.expandable import ExpandableAllocator

K, M = 1 << 10, 1 << 20
SIZES = (
    lambda r: r.randrange(1, 4 * K),
    lambda r: r.randrange(M - 8 * K, M + 8 * K),
    lambda r: r.randrange(M + 1, 12 * M),
    lambda r: r.choice((10, 11, 19, 20, 33)) * M - r.choice((0, 512, r.randrange(1200 * K))),
)


class Reusing(CachingAllocator):
    """Like CUDA, puts a new segment at the lowest addresses that are vacant."""

    def _from_device(self, requested, size, key, event):
        self.next_address = FIRST_ADDRESS
        for address, segment in sorted(self.segments.items()):
            if address - self.next_address >= segment_bytes(size):
                break
            self.next_address = address + segment.size
        return super()._from_device(requested, size, key, event)


class ReusingRanges(ExpandableAllocator):
    """Like CUDA, gives the addresses of a range that was given up to the next one."""

    def add_range(self, address, key, size=5 << 30):
        place = FIRST_ADDRESS
        while place in self.segments:
            place += size
        return super().add_range(place, key, size)


class Program:
    """Takes random steps, and notes in `trace` what the allocator does."""

    def __init__(self, seed: int, settings: Settings = DEFAULTS, record_pools: bool = False):
        self.random = random.Random(seed)
        kind = ReusingRanges if settings.expandable_segments else Reusing
        self.allocator = kind(self.random.choice((None, 150 * M, 400 * M)), settings)
        self.record_pools = record_pools
        self.live: list = []
        self.pending: list = []  # freed by the program, still used by another stream
        self.trace: list[dict[str, Any]] = []
        self.pools: list[Pool] = []  # the private pools that are in use
        self.deleted: list[Pool] = []

    def note(self, action: str, address: int, size: int, stream: int, pool: Pool) -> None:
        event = {"action": action, "addr": address, "size": size, "stream": stream}
        self.trace.append({**event, "pool_id": pool} if self.record_pools else event)

    def act(self, owner: Pool, function, *arguments, **options):
        """Call the allocator for the pool `owner`; segments that it returns on the way can be those of others."""
        known = len(self.allocator.actions)
        owners = {address: segment.pool for address, segment in self.allocator.segments.items()}
        try:
            return function(*arguments, **options)
        finally:
            for done in self.allocator.actions[known:]:
                pool = owner
                if done.name in ("segment_free", "segment_unmap"):
                    pool = owners[max(address for address in owners if address <= done.address)]
                self.note(done.name, done.address, done.bytes, done.stream, pool)

    def allocate(self, pool: Pool) -> None:
        size = self.random.choice(SIZES)(self.random)
        try:
            stream = self.random.choice((0, 0, 7))
            self.live.append(self.act(pool, self.allocator.malloc, size, stream, pool=pool))
        except OutOfMemory:
            self.note("oom", 0, size, 0, pool)

    def free(self, block, requested: bool = True) -> None:
        known = len(self.trace)
        self.act(block.segment.pool, self.allocator.free, block)
        if not requested:
            del self.trace[known]  # its free_requested came before

    def delete(self, pool: Pool) -> None:
        """Delete a CUDA graph or a MemPool; some of its tensors live on. PyTorch returns its segments now or later."""
        self.pools.remove(pool)
        self.deleted.append(pool)
        for block in [block for block in self.live if block.segment.pool == pool and self.random.random() < 0.8]:
            self.live.remove(block)
            self.free(block)
        if self.random.random() < 0.5:
            self.act(pool, self.allocator.empty_cache, pool)

    def empty_cache(self) -> None:
        for pool in (DEFAULT_POOL, *self.deleted):
            self.act(pool, self.allocator.empty_cache, pool)

    def step(self, pool: Pool) -> None:
        r, turn = self.random, self.random.random()
        if turn < 0.55:
            self.allocate(pool)
        elif turn < 0.9 and self.live:
            self.free(self.live.pop(r.randrange(len(self.live))))
        elif turn < 0.93 and self.live:
            block = self.live.pop(r.randrange(len(self.live)))
            self.note("free_requested", block.address, block.requested, block.segment.stream, block.segment.pool)
            self.pending.append(block)
        elif turn < 0.97 and self.pending:
            self.free(self.pending.pop(0), requested=False)
        elif turn > 0.99:
            self.empty_cache()

    def run(self, steps: int, delete_pools: bool) -> None:
        r = self.random
        while steps > 0:
            pool = DEFAULT_POOL
            if r.random() < 0.3:
                if not self.pools or r.random() < 0.3:
                    self.pools.append((0, 1 + len(self.pools) + len(self.deleted)))
                pool = r.choice(self.pools)
            for _ in range(r.randrange(5, 25)):
                self.step(pool)
                steps -= 1
            if delete_pools and self.pools and r.random() < 0.25:
                self.delete(r.choice(self.pools))

    def snapshot(self) -> dict[str, Any]:
        """A snapshot whose history lost its first part."""
        allocator = self.allocator
        content = snapshot.build(Replay(0, 0, 0, [], list(allocator.segments.values()), []))
        waiting = {block.address for block in self.pending}
        for segment in content["segments"]:
            for block in segment["blocks"]:
                if block["address"] in waiting:
                    block["state"] = "active_pending_free"
        divisions = allocator.settings.roundup_power2_divisions
        by_name = {
            "max_split_size": allocator.settings.max_split_size or -1,
            "roundup_power2_divisions": {"1": divisions, "2": divisions},
        }
        first = self.random.randrange(len(self.trace) * 3 // 4)
        return {**content, "allocator_settings": by_name, "device_traces": [self.trace[first:]]}


def recorded(
    seed: int,
    steps: int = 400,
    settings: Settings = DEFAULTS,
    delete_pools: bool = True,
    record_pools: bool = False,
) -> dict[str, Any]:
    program = Program(seed, settings, record_pools)
    program.run(steps, delete_pools)
    return program.snapshot()
