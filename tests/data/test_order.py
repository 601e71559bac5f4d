"""Orders: each sample once; in windows few shards at a time, the same on any ranks, small at a billion samples."""

import random
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from ds_cmli.data.order import FullOrder, ShardLanes, WindowedOrder, permutation, split_draws
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.errors import UserError

ORDERS = {  # number of samples, and the order
    "full": (20, lambda: FullOrder([12, 8])),
    "one": (9, lambda: WindowedOrder([[9]], 4)),
    "equal": (120, lambda: WindowedOrder([[10] * 12], 4)),
    "uneven": (102, lambda: WindowedOrder([[3, 17, 1, 40, 8, 8, 25]], 3)),
    "fewer shards than lanes": (11, lambda: WindowedOrder([[5, 6]], 8)),
    "fewer samples than lanes": (3, lambda: WindowedOrder([[2, 1]], 64)),
    "two sources": (88, lambda: WindowedOrder([[30, 20, 10], [7, 7, 7, 7]], 4)),
}


def test_a_permutation_is_a_function_of_its_arguments_alone():
    for _ in range(2):
        torch.rand(3)  # what the global generator does must not matter
        assert permutation(6, 0, 0).tolist() == [4, 1, 0, 2, 3, 5]  # never another order: runs resume by it


def whole_epoch(order, epoch: int = 0):
    return order.samples(np.arange(order.length), 3, epoch)


@pytest.mark.parametrize(("num_samples", "make_order"), ORDERS.values(), ids=ORDERS)
def test_an_epoch_has_each_sample_once_and_is_read_from_any_place(num_samples, make_order):
    first, second = (whole_epoch(make_order(), epoch) for epoch in range(2))
    for epoch, order in enumerate((first, second)):
        assert sorted(order.indices) == list(range(num_samples))
        assert set(order.turns) == {epoch}
    if num_samples >= 5:
        assert (first.indices != second.indices).any()
        another_seed = make_order().samples(np.arange(num_samples), 4, 1)
        assert (another_seed.indices != second.indices).any()
    chance = random.Random(0)
    for _ in range(5):
        positions = np.array(chance.sample(range(num_samples), 3))
        assert (make_order().samples(positions, 3, 1).indices == second.indices[positions]).all()


def test_places_worked_out_by_hand():
    lanes = ShardLanes(np.array([2, 3, 1]), num_lanes=2)  # 6 places: lane 0 has the first three, lane 1 the others
    lanes.shard_order = lambda key: (np.array([1, 2, 0]), np.array([3, 4, 6]))  # the line 1 1 1 2 0 0
    shards, draws = lanes.find_shards(np.arange(6), "key")
    assert shards.tolist() == [1, 2, 1, 0, 1, 0]
    assert draws.tolist() == [0, 0, 1, 0, 2, 1]


def test_a_rank_reads_its_lanes_alone():
    order = WindowedOrder([np.full(40, 25)], 8)
    starts = order.lanes[0].starts
    for ranks in (1, 2, 4, 8):
        batches = islice(GlobalBatchSampler(order, 32 // ranks, 1 % ranks, ranks, 0), 3)
        samples = [draw.sample for batch in batches for draw in batch]
        shards = np.searchsorted(starts, samples, side="right")
        assert len(set(shards)) == 8 // ranks


@pytest.mark.parametrize("is_windowed", [False, True])
@pytest.mark.parametrize("weights", [[7.0, 3.0], [1.0, 50.0], [1.0, 1e-9]])
def test_a_mixture_takes_its_shares_and_every_sample_before_one_again(is_windowed, weights):
    shards = [np.array([50, 30, 40, 700]), np.array([20, 25, 5])]
    order = WindowedOrder(shards, 8, weights) if is_windowed else FullOrder([820, 50], weights)
    epochs = [whole_epoch(order, epoch) for epoch in range(4)]
    # In windows each of 8 lanes is a mixture.
    shares = [8 * share for share in split_draws(870 // 8, weights)] if is_windowed else split_draws(870, weights)
    for epoch in epochs:
        assert [(epoch.indices < 820).sum(), (epoch.indices >= 820).sum()] == shares
    draws = Counter(pair for epoch in epochs for pair in zip(epoch.indices.tolist(), epoch.turns.tolist(), strict=True))
    assert set(draws.values()) == {1}  # no sample twice in a turn
    for first, length in ((0, 820), (820, 50)):
        turns = Counter(turn for index, turn in draws if first <= index < first + length)
        *complete, last = sorted(turns)
        assert {turns[turn] for turn in complete} <= {length} and 0 < turns[last] <= length
    assert split_draws(10, [1, 1, 1e-9]) == [5, 4, 1]  # each source keeps one


def test_a_full_mixture_is_mixed_and_not_one_source_after_the_other():
    first_half = FullOrder([30, 10], [1.0, 3.0]).samples(np.arange(20), 0, 0)  # of 10 and 30 draws
    assert 0 < (first_half.indices < 30).sum() < 10


def test_each_batch_of_a_windowed_mixture_has_all_sources_by_their_shares():
    order = WindowedOrder([np.full(100, 50), np.full(100, 50)], 16, [0.7, 0.3])
    shares = [(order.samples(start + np.arange(64), 0, 0).indices < 5000).mean() for start in range(0, 9900, 64)]
    assert min(shares) > 0.4 and max(shares) < 0.95 and np.mean(shares) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_a_shard_is_announced_before_it_is_read_also_over_the_end_of_an_epoch(weights):
    announced = []
    sizes = [np.full(20, 40), np.full(10, 60)]
    ends = np.cumsum(np.concatenate(sizes))

    def shards_of(samples) -> set[int]:
        return set(np.searchsorted(ends, samples, side="right").tolist())

    order = WindowedOrder(sizes, 4, weights, lambda samples: announced.append(shards_of(samples)))
    batches = iter(GlobalBatchSampler(order, 8, 0, 1, 0))
    read = []
    for _ in range(2 * order.length // 8 - 10):
        read.append(shards_of([draw.sample for draw in next(batches)]))
    for number, shards in enumerate(read):
        assert shards <= set().union(*announced[: number + 1])  # before its batch
        assert shards <= announced[number + 1]  # and with it: what was announced longest ago may be dropped
    lanes = 4 * (len(sizes) if weights else 1)  # with weights of each source
    assert max(map(len, announced)) <= 2 * lanes + 2


@pytest.mark.parametrize(("weights", "num_bytes"), [(None, 50e6), ([0.7, 0.3], 1e9)])
def test_a_billion_samples_take_little_memory_and_no_time(weights, num_bytes):
    sizes = [np.full(50_000, 10_000), np.full(50_000, 10_000)]
    tracemalloc.start()
    order = WindowedOrder(sizes, 64, weights)
    batches = GlobalBatchSampler(order, 256, 3, 8, 0)
    batches.load_state_dict({"epoch": 2, "position": 400_000_000, "length": 10**9, "seed": 0, "window": 64})
    samples = [draw.sample for batch in islice(batches, 3) for draw in batch]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(samples)) == 3 * 256 and peak < num_bytes


def test_the_full_order_holds_four_bytes_a_sample():
    order = FullOrder([1_000_000])
    order.samples(np.arange(10), 0, 0)
    samples = order.epoch_future(0, 0).result()
    assert samples.indices.nbytes == 4_000_000
    assert samples.turns.strides == (0,)


@pytest.mark.parametrize(("global_batch", "epoch", "first"), [(2, 0, 20), (8, 1, 0)])
def test_another_global_batch_goes_on_and_a_larger_one_loses_only_the_end_of_the_epoch(global_batch, epoch, first):
    sampler = GlobalBatchSampler(26, global_batch, 0, 1, 3)
    sampler.load_state_dict({"epoch": 0, "position": 20, "length": 26, "seed": 3, "window": 0})
    draws = next(iter(sampler))  # 6 samples of the epoch are left
    assert [draw.sample for draw in draws] == permutation(26, 3, epoch)[first : first + global_batch].tolist()
    sampler.advance()
    assert (sampler.epoch, sampler.position) == (epoch, first + global_batch)


def test_a_run_goes_on_with_the_data_seed_and_order_that_it_began_with():
    full_order = GlobalBatchSampler(100, 10, 0, 1, 3)
    windowed = GlobalBatchSampler(WindowedOrder([[50, 50]], 2), 10, 0, 1, 3)
    state = full_order.state_dict()
    before_windows = {name: value for name, value in state.items() if name != "window"}
    full_order.load_state_dict(before_windows)
    for sampler, saved, message in (
        (GlobalBatchSampler(101, 10, 0, 1, 3), state, "length of 100"),
        (GlobalBatchSampler(100, 10, 0, 1, 4), state, "seed of 3"),
        (full_order, windowed.state_dict(), r"shuffled 2 shards together: give --set data\.shuffle_window=2"),
        (windowed, before_windows, r"shuffled all shards together: give --set data\.shuffle_window=0"),
    ):
        with pytest.raises(UserError, match=message):
            sampler.load_state_dict(saved)
