"""Expandable segments on programs whose addresses and reserved bytes follow from PyTorch's rules by hand."""

import pytest

from ds_cmli.allocator.blocks import FIRST_ADDRESS, OutOfMemory
from ds_cmli.allocator.expandable import ExpandableAllocator

K, M = 1 << 10, 1 << 20


def test_memory_is_mapped_in_pieces_of_the_pool():
    allocator = ExpandableAllocator()
    allocator.malloc(100 * K)
    assert allocator.reserved == 2 * M
    allocator.malloc(30 * M)  # another pool: two pieces of 20 MiB
    assert allocator.reserved == 2 * M + 40 * M
    assert [(done.name, done.bytes) for done in allocator.actions if "segment" in done.name] == [
        ("segment_map", 2 * M),
        ("segment_map", 40 * M),
    ]


def test_a_free_end_grows():
    allocator = ExpandableAllocator()
    allocator.free(allocator.malloc(30 * M))
    block = allocator.malloc(45 * M)
    assert (block.address, allocator.reserved) == (FIRST_ADDRESS, 60 * M)
    assert allocator.malloc(20 * M).address == FIRST_ADDRESS + 45 * M  # 15 MiB that are left, and one piece more
    assert allocator.reserved == 80 * M


def test_a_block_that_could_grow_is_spared():
    allocator = ExpandableAllocator()
    first = allocator.malloc(12 * M)
    allocator.malloc(18 * M)
    allocator.free(first)
    # Free are 12 MiB at the beginning and, as the best fit, 10 MiB at the end, which can grow.
    assert allocator.malloc(9 * M).address == FIRST_ADDRESS


def test_the_rest_of_a_large_block_is_split_off_from_512_bytes_on():
    allocator = ExpandableAllocator()
    allocator.malloc(20 * M - 512)
    assert allocator.allocated == 20 * M - 512


def test_whole_free_pieces_go_back_before_memory_is_out():
    allocator = ExpandableAllocator(limit=100 * M)
    first = allocator.malloc(30 * M)
    allocator.malloc(45 * M)  # 80 MiB are mapped, the last 5 of them free
    allocator.free(first)
    block = allocator.malloc(38 * M)  # two pieces more, for which one of the first block's two goes back
    assert (block.address, allocator.reserved) == (FIRST_ADDRESS + 75 * M, 100 * M)
    assert allocator.actions[-3].name == "segment_unmap" and allocator.actions[-3].bytes == 20 * M
    # 10 MiB of the first block are still free behind the unmapped piece, which is mapped again.
    with pytest.raises(OutOfMemory) as error:
        allocator.malloc(29 * M)
    assert error.value.missing == 20 * M
    assert allocator.malloc(7 * M).address == FIRST_ADDRESS + 20 * M
