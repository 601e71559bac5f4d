"""Counted operations against numbers by hand, and shares of time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_cmli.engine import throughput
from ds_cmli.engine.throughput import ModelFlops, StepTimer, peak_flops


def test_products_are_counted_with_the_backward_to_come(monkeypatch):
    monkeypatch.setattr(F, "linear", torch._C._nn.linear)  # an engine of ZeRO-3 before this test has replaced it
    x = torch.ones(5, 3)
    with ModelFlops(trained=True) as counted:
        nn.Linear(3, 7)(x)
    assert counted.flops == 3 * 2 * 5 * 3 * 7
    with ModelFlops(trained=True) as counted:  # a weight that is not trained: forward alone
        nn.Linear(3, 7).requires_grad_(False)(x)
    assert counted.flops == 2 * 5 * 3 * 7
    with ModelFlops(trained=True) as counted:  # as BEiT's attention calls it
        F.linear(x, weight=torch.ones(7, 3), bias=None)
    assert counted.flops == 2 * 5 * 3 * 7
    with ModelFlops(trained=False) as counted:
        nn.Conv2d(3, 4, 2, stride=2)(torch.ones(2, 3, 8, 8))  # 4 x 4 places, 12 numbers each
        x @ x.T
    assert counted.flops == 2 * 2 * 4 * 16 * 12 + 2 * 5 * 5 * 3
    query = torch.ones(2, 4, 6, 8)  # [B, heads, tokens, width]
    with ModelFlops(trained=False) as counted:
        F.scaled_dot_product_attention(query, query, query)
    assert counted.flops == 2 * 2 * (2 * 4 * 6 * 6 * 8)  # scores, and their product with the values


def test_shares_of_time(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 6.5, 9.0, 100.0, 110.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    timer = StepTimer()
    timer.mark("data")  # 0 to 1
    timer.mark("forward")  # 1 to 2, and 4 to 5, and 6 to 6.5
    with timer.inside("exchange"):  # 2 to 4
        pass
    with timer.inside("loss"):  # 5 to 6
        pass
    timer.mark("backward")  # 6.5 to 9
    timer.mark(None)  # an evaluation
    timer.mark("data")
    timer.flops = 18e12
    result = timer.lap(peak=4e12)
    assert result == {
        "time/data": pytest.approx(1 / 9, abs=1e-4), "time/forward": pytest.approx(2.5 / 9, abs=1e-4),
        "time/loss": pytest.approx(1 / 9, abs=1e-4), "time/backward": pytest.approx(2.5 / 9, abs=1e-4),
        "time/step": 0.0, "time/exchange": pytest.approx(2 / 9, abs=1e-4), "tflops": 2.0, "mfu": 0.5,
    }  # fmt: skip
    timer.mark(None)
    assert timer.lap(peak=4e12)["time/data"] == 1.0  # from the lap on alone


@pytest.mark.parametrize("flops, columns", [(4e9, {"tflops": 0.004}), (2e10, {"tflops": 0.02, "mfu": 0.005})])
def test_an_mfu_that_would_be_shown_as_nothing_is_left_out(flops, columns):
    timer = StepTimer()
    timer.marks, timer.flops = [("forward", 0.0), (None, 1.0)], flops
    result = timer.lap(peak=4e12)
    assert {name: value for name, value in result.items() if not name.startswith("time/")} == columns


def test_a_peak_is_measured():
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
