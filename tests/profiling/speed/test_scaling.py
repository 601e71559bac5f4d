"""The time of a step from rates, by hand; that counts equal those of real ranks is shown in `test_real_ranks.py`."""

from dataclasses import replace

import pytest

from ds_cmli.distributed.traffic import CallCount
from profiling.speed.scaling import Rates, StepCost, crossovers, step_time

RATES = Rates(flops=1e12, node_bandwidth=1e9, bandwidth=1e8, latency=1e-3, ranks_per_node=4)


def cost(ranks, exchange, memory=1, cached=False, checkpointing=False, **counts):
    moved = {("text", kind.replace("_", "-")): count for kind, count in counts.items()}
    sizes = (500, 1000, 100, 100, 100)  # 1e12 FLOPs
    return StepCost(ranks, 2, exchange, cached, 1, memory, 3e12, sizes, checkpointing, moved)


def test_gathering_is_waited_for():
    result = step_time(cost(4, "gather", all_gather=CallCount(2, 4 * 10**9)), RATES)
    # 3 of 4 GB at 1 GB/s, and two calls of log2(4) messages of 1 ms.
    assert result == {"model": 3.0, "scores": 3.0, "text": pytest.approx(3.004), "rest": 0.0}


def test_a_ring_is_hidden_behind_the_scores():
    # One product more, as argmax indices are computed again: 4 s. Sending takes 3 s in a node, 30 s between nodes.
    assert step_time(cost(4, "ring", send=CallCount(6, 3 * 10**9)), RATES)["text"] == 0.0
    assert step_time(cost(8, "ring", send=CallCount(6, 3 * 10**9)), RATES)["text"] == pytest.approx(30.006 - 4)


def test_what_is_computed_again():
    result = step_time(cost(1, "gather", cached=True, checkpointing=True), RATES)
    assert result == {"model": 5.0, "scores": 4.0, "text": 0.0, "rest": 0.0}
    assert step_time(cost(4, "ring", cached=True), RATES)["scores"] == 4.0
    assert CallCount(1, 8 * 10**9).sent("all-reduce", 4) == 12 * 10**9  # to scatter the sums, and to gather them


def test_pairs_that_a_cut_leaves_out():
    # The scores themselves, once or twice, are those of all pairs; two products of the backward are of a tenth.
    assert step_time(cost(1, "gather"), RATES, 0.1)["scores"] == pytest.approx(1.2)
    assert step_time(cost(4, "ring"), RATES, 0.1)["scores"] == pytest.approx(2.2)
    computed = replace(RATES, scores=lambda cost, kept: cost.ranks + kept)
    assert step_time(cost(4, "ring", send=CallCount(6, 3 * 10**9)), computed, 0.5) == {
        "model": 3.0, "scores": 4.5, "text": 0.0, "rest": 0.0
    }  # fmt: skip


def test_crossovers_in_words():
    costs = [cost(1, "gather", 10)]
    for ranks, gathered in ((2, 10), (8, 40), (64, 300)):
        costs += [cost(ranks, "gather", gathered, all_gather=CallCount(1, 10**9)), cost(ranks, "ring", 20)]
    (line,) = crossovers(costs, RATES, 50)
    assert line == (
        "ZeRO 2, not cached: a ring takes less memory from 8 ranks on; less time from 8 ranks on; "
        "gather fits at 1, 2, 8; ring fits up to 64 ranks at least"
    )
