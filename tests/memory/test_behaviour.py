"""The model of the caching allocator by hand; predictions by the command against what training holds."""

import json
from pathlib import Path

import pytest

from ds_cmli.memory_model.caching_allocator import CachingAllocator, OutOfMemory
from tests import make

MiB = 2**20
ZERO = {"stage": 2, "reduce_bucket_size": 1000}


def test_requests_are_rounded_and_segments_have_their_pools_sizes():
    allocator = CachingAllocator()
    allocator.malloc(1)
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (1, 512, 2 * MiB)
    allocator.malloc(MiB)  # still a small one, beside the first
    assert allocator.allocated == 512 + MiB and allocator.reserved == 2 * MiB
    allocator.malloc(MiB + 1)
    assert allocator.reserved == 22 * MiB
    allocator.malloc(10 * MiB)  # of the rest of that segment
    assert allocator.reserved == 22 * MiB
    allocator.malloc(10 * MiB)
    assert allocator.reserved == 32 * MiB
    allocator.malloc(11 * MiB + 1)
    assert allocator.reserved == 44 * MiB


def test_a_rest_of_a_large_block_is_used_again_if_it_has_more_than_a_mebibyte():
    for rest, used_again in ((MiB, False), (MiB + 512, True)):
        allocator = CachingAllocator()
        allocator.free(allocator.malloc(20 * MiB))
        allocator.malloc(20 * MiB - rest)
        assert allocator.allocated == 20 * MiB - (rest if used_again else 0)
        allocator.malloc(rest if rest > MiB else MiB + 512)
        assert allocator.reserved == (20 if used_again else 40) * MiB


@pytest.mark.parametrize("freed", [(1, 2), (2, 1)])
def test_freed_neighbours_become_one_block_and_the_smallest_that_is_large_enough_is_taken(freed):
    allocator = CachingAllocator()
    blocks = [allocator.malloc(5 * MiB) for _ in range(4)]
    assert allocator.reserved == 20 * MiB
    for number in freed:
        allocator.free(blocks[number])
    other = allocator.malloc(12 * MiB)
    allocator.free(other)
    assert allocator.reserved == 32 * MiB
    allocator.malloc(10 * MiB)  # into the two in the middle, and not into the 12
    allocator.malloc(12 * MiB)
    assert allocator.reserved == 32 * MiB and allocator.allocated == 32 * MiB


def test_what_is_cached_is_returned_before_memory_ends():
    allocator = CachingAllocator(limit=40 * MiB)
    allocator.free(allocator.malloc(30 * MiB))
    kept = allocator.malloc(20 * MiB, stream=1)
    assert allocator.reserved == 20 * MiB
    with pytest.raises(OutOfMemory):
        allocator.malloc(22 * MiB)
    allocator.free(kept)


# Predictions.


def predicted(folder: Path, name: str, options: dict | None = None, settings: dict | None = None, **json_) -> dict:
    from ds_cmli.memory.command import command

    ds_config = make.json_file(folder / f"{name}.ds.json", {"zero_optimization": ZERO, **json_})
    own = {"--deepspeed_config": ds_config, "--json": folder / f"{name}.json", **(options or {})}
    assert not command.main(make.small(own, settings), standalone_mode=False)
    return json.loads((folder / f"{name}.json").read_text())


ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "bf16": {"enabled": True}}
LOSSES = {"loss.weights": '{"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}'}


def test_what_stays_through_a_step_is_counted_once_and_shared_by_ranks(tmp_path):
    """bf16 weights of 2 B each; the fp32 copy and two moments, 12 B, of which two ranks have a half each."""
    one = predicted(tmp_path, "one", settings=LOSSES, **ADAM)
    two = predicted(tmp_path, "two", {"--world-size": 2}, LOSSES, **ADAM)
    objective, teacher = make.models(loss={"weights": {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}})
    count = sum(p.numel() for p in objective.parameters())
    of_teacher = sum(p.numel() for p in teacher.parameters())
    for report, share in ((one, 1), (two, 2)):
        of = report["categories"]
        assert of["parameters"] == pytest.approx(2 * count, rel=0.05)
        assert of["master weights"] == pytest.approx(4 * count / share, rel=0.02)
        assert of["optimizer states"] == pytest.approx(8 * count / share, rel=0.02)
        assert of["teacher"] == pytest.approx(2 * of_teacher, rel=0.1)
        assert sum(of.values()) == report["totals"]["requested"] == max(report["phases"].values())


def test_activations_grow_with_the_micro_batch_and_weights_do_not(tmp_path):
    # Large enough for both peaks to be the same moment of backward, whose cuBLAS workspace is 17 MB.
    small, large = (predicted(tmp_path, str(size), {"--micro-batch": size}, LOSSES, **ADAM) for size in (128, 512))
    assert small["categories"]["parameters"] == large["categories"]["parameters"]
    assert small["categories"]["optimizer states"] == large["categories"]["optimizer states"]
    of = [report["categories"]["activations student"] for report in (small, large)]
    assert 3 * of[0] < of[1] < 5 * of[0] and small["totals"]["requested"] < large["totals"]["requested"]
