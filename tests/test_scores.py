"""The combined scores are each direction's own, whatever was trained."""

import pytest
import torch

from ds_cmli.scores import both_ways

COSINES = torch.tensor([[0.5, 0.1]])
I2T, T2I = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.125]])


@pytest.mark.parametrize(
    ("scales", "i2t", "t2i"),
    [
        ({"global": 10.0, "cmli": 4.0}, [[6.0, 4.0]], [[7.0, 1.5]]),
        ({"cmli": 4.0}, [[1.0, 3.0]], [[2.0, 0.5]]),
        ({"global": 10.0}, [[5.0, 1.0]], [[5.0, 1.0]]),
        ({}, [[0.5, 0.1]], [[0.5, 0.1]]),  # a distillation alone has no temperature
    ],
)
def test_each_direction_takes_its_own_cmli_and_only_what_was_trained(scales, i2t, t2i):
    result = both_ways(COSINES, (I2T, T2I), scales)
    assert list(result) == ["global", "cmli", "combined"]
    torch.testing.assert_close(result["combined"].i2t, torch.tensor(i2t))
    torch.testing.assert_close(result["combined"].t2i, torch.tensor(t2i))
    assert torch.equal(result["cmli"].i2t, I2T) and torch.equal(result["cmli"].t2i, T2I)
