from types import SimpleNamespace

import pytest
import torch

from ds_cmli.common.errors import UserError
from ds_cmli.data.mixture import permutation
from ds_cmli.data.sampler import Draw, GlobalBatchSampler
from ds_cmli.memory import cpu_events


def take(sampler, count):
    """The next batches of a train_engine that consumes each."""
    batches = []
    for batch, _ in zip(sampler, range(count), strict=False):
        batches.append([draw.sample for draw in batch])
        sampler.advance()
    return batches


def global_batches(length, micro_batch, world_size, count, state=None, seed=3):
    ranks = [GlobalBatchSampler(length, micro_batch, r, world_size, seed) for r in range(world_size)]
    for sampler in ranks:
        if state:
            sampler.load_state_dict(state)
    taken = [take(sampler, count) for sampler in ranks]
    return [[i for part in parts for i in part] for parts in zip(*taken, strict=True)], ranks[0].state_dict()


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_only():
    order = permutation(100, 1, 2)
    assert sorted(order.tolist()) == list(range(100))
    torch.rand(3)  # what the global generator does must not matter
    assert torch.equal(order, permutation(100, 1, 2))
    assert not torch.equal(order, permutation(100, 2, 1))
    assert not torch.equal(order, permutation(100, 1, 3))


def test_any_number_of_ranks_sees_the_same_global_batches_across_epochs():
    one, _ = global_batches(26, 4, 1, 15)
    two, _ = global_batches(26, 2, 2, 15)
    four, _ = global_batches(26, 1, 4, 15)
    assert one == two == four
    assert one[0] == permutation(26, 3, 0)[:4].tolist()
    assert one[6] == permutation(26, 3, 1)[:4].tolist()  # 26 = 6 x 4 + 2 dropped


def test_resuming_on_another_number_of_ranks_continues_the_same_order():
    whole, _ = global_batches(26, 4, 1, 15)
    first, state = global_batches(26, 2, 2, 8)
    assert (state["epoch"], state["position"]) == (1, 8)
    rest, _ = global_batches(26, 1, 4, 7, state)
    assert first + rest == whole


def test_resuming_with_a_larger_global_batch_loses_only_the_end_of_the_epoch():
    _, state = global_batches(26, 4, 1, 5)
    assert state["position"] == 20
    larger, after = global_batches(26, 8, 1, 1, state)  # 6 samples of the epoch are left, fewer than 8
    assert larger == [permutation(26, 3, 1)[:8].tolist()]
    assert (after["epoch"], after["position"]) == (1, 8)


def test_a_draw_tells_how_often_its_sample_was_drawn_before():
    sampler = GlobalBatchSampler(8, 4, 0, 1, 0)
    turns = [[draw.turn for draw in batch] for batch, _ in zip(sampler, range(5), strict=False)]
    assert turns == [[0] * 4] * 2 + [[1] * 4] * 2 + [[2] * 4]


def test_only_advance_moves_the_position():
    sampler = GlobalBatchSampler(10, 2, 0, 1, 0)
    ahead = iter(sampler)
    for _ in range(9):  # a loader that prefetches, even into the next epoch
        next(ahead)
    assert (sampler.epoch, sampler.position) == (0, 0)
    sampler.advance()
    assert sampler.position == 2
    assert next(iter(sampler)) == [Draw(index, 0) for index in permutation(10, 0, 0)[2:4].tolist()]


def test_too_small_a_set_names_the_three_numbers():
    with pytest.raises(UserError, match=r"7 samples.*8 = 4 \(micro-batch\) x 2 \(ranks\)"):
        GlobalBatchSampler(7, 4, 0, 2, 0)
    assert GlobalBatchSampler(8, 4, 0, 2, 0).batches_per_epoch == 1


@pytest.mark.parametrize(("length", "seed", "named"), [(11, 0, "length of 10"), (10, 1, "seed of 0")])
def test_resuming_another_order_is_refused(length, seed, named):
    state = GlobalBatchSampler(10, 2, 0, 1, 0).state_dict()
    with pytest.raises(UserError, match=named):
        GlobalBatchSampler(length, 2, 0, 1, seed).load_state_dict(state)


def test_a_micro_batch_that_has_lost_pairs_is_refused():
    sampler = GlobalBatchSampler(64, 8, 0, 2, 0)
    whole, less = (SimpleNamespace(index=torch.arange(n)) for n in (8, 7))
    assert sampler.checked(whole) is whole
    with pytest.raises(UserError, match="a micro-batch of 7 pairs instead of 8"):
        sampler.checked(less)


def test_the_order_of_the_samples_does_not_count_as_memory_of_a_step():
    batches = iter(GlobalBatchSampler(1000, 4, 0, 1, 0))
    sizes = cpu_events.sizes(lambda: next(batches))
    assert max(sizes) >= 8 * 1000 and sum(sizes) == 0
