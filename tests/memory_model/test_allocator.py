"""The allocator's model against cases worked out by hand from the rules, and against what CUDA's allocator recorded."""

import pytest

from ds_cmli.memory_model.caching_allocator import CachingAllocator, Event, OutOfMemory, replay

K = 1 << 10
M = 1 << 20


def taken(steps: list[int], limit: int = 1 << 44) -> CachingAllocator:
    """Take steps. Positive: allocate so many bytes; -n: free the n-th allocation, counted from 1."""
    allocator = CachingAllocator(limit=limit)
    blocks = []
    for step in steps:
        if step > 0:
            blocks.append(allocator.malloc(step))
        else:
            allocator.free(blocks[-step - 1])
    return allocator


# Steps, then (requested, allocated, reserved) after the last one, then each segment as its blocks' sizes, + in use.
CASES = {
    "one byte takes 512 of a 2 MiB segment": ([1], (1, 512, 2 * M), ["+512 2096640"]),
    "1 MiB is the largest of the small pool, two fill a segment":
        ([M, M, 1], (2 * M + 1, 2 * M + 512, 4 * M), ["+1048576 +1048576", "+512 2096640"]),
    "one byte more rounds to 1 MiB + 512 and is of the large pool":
        ([M + 1], (M + 1, M + 512, 20 * M), [f"+{M + 512} {19 * M - 512}"]),
    # The rest after the second is 1 MiB + 512, above 1 MiB: split off.
    "below 10 MiB: 20 MiB, which the next one shares":
        ([10 * M - 512, 9 * M], (19 * M - 512, 19 * M - 512, 20 * M), [f"+{10 * M - 512} +{9 * M} {M + 512}"]),
    "10 MiB get 10 MiB, 10 MiB + 1 get 12 with the rest kept as it is over 1 MiB":
        ([10 * M, 10 * M + 1], (20 * M + 1, 20 * M + 512, 22 * M), [f"+{10 * M}", f"+{10 * M + 512} {2 * M - 512}"]),
    "a rest of exactly 1 MiB in the large pool stays with the block and counts as allocated":
        ([11 * M], (11 * M, 12 * M, 12 * M), [f"+{12 * M}"]),
    "it merges with free blocks on both sides":
        ([512, 512, 512, 512, -1, -3, -2], (512, 512, 2 * M), [f"1536 +512 {2 * M - 2048}"]),
    # Free: 3 KiB (first), 1 KiB (third), the rest of the segment. 1 KiB goes into the third.
    "best fit: the smallest free block that holds it, not the first":
        ([3 * K, 512, K, 512, -1, -3, K], (2 * K, 2 * K, 2 * M), [f"3072 +512 +1024 +512 {2 * M - 5 * K}"]),
    "a large free block does not serve the small pool":
        ([20 * M, -1, K], (K, K, 22 * M), [f"{20 * M}", "+1024 2096128"]),
    # 20 MiB hold 6 + 2 + 6 MiB and a rest of 6: freed, they are 6 and 12, so 12 fit; 13 need a segment of 14: its rest
    # is exactly 1 MiB and stays with the block.
    "fragmentation: 2 x 6 MiB free, apart, do not serve 12":
        ([6 * M, 2 * M, 6 * M, -1, -3, 13 * M], (15 * M, 16 * M, 34 * M), [f"{6 * M} +{2 * M} {12 * M}", f"+{14 * M}"]),
}  # fmt: skip


def layout(allocator: CachingAllocator) -> list[str]:
    segments = sorted(allocator.segments.values(), key=lambda s: s.address)
    return [" ".join(f"{'+' if b.requested else ''}{b.size}" for b in s.blocks) for s in segments]


@pytest.mark.parametrize("case", CASES)
def test_worked_out_by_hand(case):
    steps, totals, blocks = CASES[case]
    allocator = taken(steps)
    assert (allocator.requested, allocator.allocated, allocator.reserved) == totals
    assert layout(allocator) == blocks


def test_recorded_state_after_a_matrix_product():
    """The segments of `torch.rand(1000) @ W + b` with W [1000, 10] and b [10], as recorded by torch 2.0.

    https://discuss.pytorch.org/t/178671: blocks of 40448, 512, 4096, 512 (free: the product), 512 and the rest in a
    small segment; the cuBLAS workspace, 8,519,680 B, with 12,451,840 B free behind it in a large one.
    """
    allocator = taken([40000, 40, 4000, 40, 8519680, 40, -4])
    assert layout(allocator) == ["+40448 +512 +4096 512 +512 2051072", "+8519680 12451840"]


def test_a_limit_returns_what_is_cached_and_keeps_segments_in_part_use():
    # 30 MiB cached and free, too small for 32; 32 more exceed 40, so the 30 go back to the device.
    assert taken([30 * M, -1, 32 * M - 1], 40 * M).reserved == 32 * M
    # 1 KiB in use holds its 2 MiB: 39 MiB do not fit 40, though 41 MiB less 1 KiB are not allocated.
    with pytest.raises(OutOfMemory, match="40,894,464 bytes asked for with 2,097,152 of 41,943,040"):
        taken([K, 30 * M, -2, 39 * M], 40 * M)


def test_an_emptied_cache_returns_free_segments_and_streams_share_none():
    allocator = taken([30 * M, -1])
    allocator.malloc(30 * M, stream=1)
    assert allocator.reserved == 60 * M
    allocator.empty_cache()
    assert allocator.reserved == 30 * M


def test_a_block_that_another_stream_may_read_is_in_use_and_not_allocated_until_its_free_completes():
    """As `free` (allocated bytes) and `free_block` (requested bytes) of CUDACachingAllocator.cpp."""
    events = [
        Event(0, 3 * M, "data", "forward"),
        Event(0, 0, "data", "forward", requests_free=True),
        Event(1, 3 * M, "data", "forward"),
        Event(0, -3 * M, "data", "forward"),
    ]
    allocator = replay(events)
    assert allocator.peaks == (6 * M, 3 * M, 20 * M)
    assert layout(allocator) == [f"{3 * M} +{3 * M} {14 * M}"]
    names = [action.name for action in allocator.actions]
    assert names == ["segment_alloc", "alloc", "free_requested", "alloc", "free_completed"]
