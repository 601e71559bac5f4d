from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from ds_cmli.common.errors import UserError
from ds_cmli.data.sampler import Draw, GlobalBatchSampler, Mixture, permutation
from ds_cmli.memory import cpu_events


def draws(mixture, seed, epoch):
    indices, turns = mixture.order(seed, epoch)
    return list(zip(indices.tolist(), turns.tolist(), strict=True))


def test_without_weights_an_epoch_is_one_permutation_over_all():
    mixture = Mixture([10, 5])
    for epoch in range(2):
        indices, turns = mixture.order(3, epoch)
        assert torch.equal(indices, permutation(15, 3, epoch))
        assert set(turns.tolist()) == {epoch}


def test_an_epoch_takes_each_sources_share():
    mixture = Mixture([70, 30], [0.5, 0.5])
    assert mixture.shares == [50, 50]
    for epoch in range(3):
        of_first = [sample < 70 for sample, _ in draws(mixture, 0, epoch)]
        assert sum(of_first) == 50
        assert 10 < sum(of_first[:50]) < 40  # mixed, not one source after the other
    assert Mixture([10, 10, 10], [1, 1, 1]).shares == [10, 10, 10]
    assert Mixture([4, 3], [2, 1]).shares == [5, 2]  # of 4.67 and 2.33


@pytest.mark.parametrize(
    ("lengths", "weights", "shares", "raised"),
    [
        ([3, 3, 4], [1, 1, 1e-9], [5, 4, 1], [2]),
        ([200, 200], [0.002, 1], [1, 399], []),  # 0.8 of 400
        ([200, 200], [0.001, 1], [1, 399], [0]),  # 0.4 of 400
        ([200, 200], [1e308, 1e308], [200, 200], []),
        ([200, 200], [5e-324, 1e308], [1, 399], [0]),
        ([200, 200], [5e-324, 5e-324], [200, 200], []),
        ([1, 1, 1], [1, 1e-9, 1e-9], [1, 1, 1], [1, 2]),
    ],
)
def test_every_source_keeps_a_sample_an_epoch(lengths, weights, shares, raised):
    mixture = Mixture(lengths, weights)
    assert mixture.shares == shares
    assert mixture.raised == raised
    assert len(draws(mixture, 0, 0)) == sum(lengths)


def test_all_samples_of_a_source_are_taken_before_one_comes_again():
    mixture = Mixture([7, 3], [0.2, 0.8])  # 2 and 8 of 10
    taken = [draw for epoch in range(21) for draw in draws(mixture, 5, epoch)]
    by_turn = Counter((sample, turn) for sample, turn in taken)
    assert set(by_turn.values()) == {1}  # a sample once a turn
    assert [sum(sample == k for sample, _ in taken) for k in range(7)] == [6] * 7
    assert [sum(sample == k for sample, _ in taken) for k in range(7, 10)] == [56] * 3
    assert {turn for sample, turn in taken if sample < 7} == set(range(6))


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    mixture = Mixture([20, 10], [1, 2])
    assert draws(mixture, 1, 4) == draws(Mixture([20, 10], [10, 20]), 1, 4)
    assert draws(mixture, 1, 4) != draws(mixture, 2, 4)
    assert draws(mixture, 1, 4) != draws(mixture, 1, 5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_mixture_as_they_share_a_source(ranks):
    mixture = Mixture([20, 10], [1, 2])
    samplers = [GlobalBatchSampler(mixture, 8 // ranks, rank, ranks, 1) for rank in range(ranks)]
    result = [draw for parts in zip(*samplers, range(3), strict=False) for part in parts[:-1] for draw in part]
    assert [tuple(draw) for draw in result] == draws(mixture, 1, 0)[:24]


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
