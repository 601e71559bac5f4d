import pytest
import torch

from ds_cmli.common.errors import UserError
from ds_cmli.data.sampler import Draw, GlobalBatchSampler, Mixture, permutation


def draws(mixture, seed, epoch):
    indices, turns = mixture.order(seed, epoch)
    return list(zip(indices.tolist(), turns.tolist(), strict=True))


def test_without_weights_an_epoch_is_one_permutation_over_all():
    mixture = Mixture([10, 5])
    for epoch in range(2):
        indices, turns = mixture.order(3, epoch)
        assert torch.equal(indices, permutation(15, 3, epoch))
        assert set(turns.tolist()) == {epoch}


def test_a_permutation_is_a_function_of_its_arguments_alone():
    order = permutation(100, 1, 2)
    assert sorted(order.tolist()) == list(range(100))
    torch.rand(3)  # what the global generator does must not matter
    assert torch.equal(order, permutation(100, 1, 2))
    assert not torch.equal(order, permutation(100, 2, 1))
    assert not torch.equal(order, permutation(100, 1, 3))
    assert permutation(6, 0, 0).tolist() == [4, 1, 0, 2, 3, 5]  # never another order: runs resume by it


def test_an_epoch_takes_each_sources_share():
    mixture = Mixture([70, 30], [0.5, 0.5])
    assert mixture.shares == [50, 50]
    for epoch in range(3):
        of_first = [sample < 70 for sample, _ in draws(mixture, 0, epoch)]
        assert sum(of_first) == 50
        assert 10 < sum(of_first[:50]) < 40  # mixed, not one source after the other
    assert Mixture([4, 3], [2, 1]).shares == [5, 2]  # of 4.67 and 2.33


@pytest.mark.parametrize(
    ("lengths", "weights", "shares"),
    [
        ([3, 3, 4], [1, 1, 1e-9], [5, 4, 1]),
        ([200, 200], [0.002, 1], [1, 399]),  # 0.8 of 400
        ([200, 200], [1e308, 1e308], [200, 200]),
        ([200, 200], [5e-324, 1e308], [1, 399]),
        ([1, 1, 1], [1, 1e-9, 1e-9], [1, 1, 1]),
    ],
)
def test_every_source_keeps_a_sample_an_epoch(lengths, weights, shares):
    mixture = Mixture(lengths, weights)
    assert mixture.shares == shares
    assert len(draws(mixture, 0, 0)) == sum(lengths)


def global_batches(samples, micro_batch, world_size, count, state=None, seed=3):
    """The next batches of a training that consumes each: by rank, joined, and the state afterwards."""
    ranks = [GlobalBatchSampler(samples, micro_batch, r, world_size, seed) for r in range(world_size)]
    taken = []
    for sampler in ranks:
        if state:
            sampler.load_state_dict(state)
        taken.append([])
        for batch, _ in zip(sampler, range(count), strict=False):
            taken[-1].append(batch)
            sampler.advance()
    return [[draw for part in parts for draw in part] for parts in zip(*taken, strict=True)], ranks[0].state_dict()


def test_any_number_of_ranks_sees_the_same_batches_and_resumes_them():
    samples = Mixture([17, 9], [1, 2])
    whole, _ = global_batches(samples, 8, 1, 15)
    assert [tuple(draw) for draw in whole[0]] == draws(samples, 3, 0)[:8]
    for micro_batch, ranks in ((4, 2), (2, 4), (1, 8)):
        assert global_batches(samples, micro_batch, ranks, 15)[0] == whole
        for stop in (0, 1, 3, 4, 11):  # 26 = 3 x 8 + 2 dropped: some behind an epoch
            first, state = global_batches(samples, 8 // ranks, ranks, stop)
            rest, _ = global_batches(samples, micro_batch, ranks, 15 - stop, state)
            assert first + rest == whole


def test_a_larger_global_batch_loses_only_the_end_of_the_epoch():
    _, state = global_batches(26, 4, 1, 5)
    assert state["position"] == 20
    larger, after = global_batches(26, 8, 1, 1, state)  # 6 samples of the epoch are left, fewer than 8
    assert [draw.sample for draw in larger[0]] == permutation(26, 3, 1)[:8].tolist()
    assert (after["epoch"], after["position"]) == (1, 8)


def test_only_advance_moves_the_position():
    sampler = GlobalBatchSampler(10, 2, 0, 1, 0)
    ahead = iter(sampler)
    for _ in range(9):  # a loader that prefetches, even into the next epoch
        next(ahead)
    assert (sampler.epoch, sampler.position) == (0, 0)
    sampler.advance()
    assert sampler.position == 2
    assert next(iter(sampler)) == [Draw(index, 0) for index in permutation(10, 0, 0)[2:4].tolist()]


def test_too_few_samples_and_another_order_are_refused():
    with pytest.raises(UserError, match=r"7 samples.*8 = 4 \(micro-batch\) x 2 \(ranks\)"):
        GlobalBatchSampler(7, 4, 0, 2, 0)
    state = GlobalBatchSampler(10, 2, 0, 1, 0).state_dict()
    for length, seed, named in ((11, 0, "length of 10"), (10, 1, "seed of 0")):
        with pytest.raises(UserError, match=named):
            GlobalBatchSampler(length, 2, 0, 1, seed).load_state_dict(state)
