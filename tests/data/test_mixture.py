from collections import Counter

import pytest
import torch

from ds_cmli.data.mixture import Mixture, permutation
from ds_cmli.data.sampler import GlobalBatchSampler


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
    found = [draw for parts in zip(*samplers, range(3), strict=False) for part in parts[:-1] for draw in part]
    assert [tuple(draw) for draw in found] == draws(mixture, 1, 0)[:24]
