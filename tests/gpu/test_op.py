"""The all-pairs op on a GPU: against the fp64 reference, and against the clock."""

import pytest
import torch

from tests.gpu import op_check
from tests.gpu.figures import GRADIENT_BARS, exactness_figures, judge, speed_figures


@pytest.mark.parametrize("dtype", GRADIENT_BARS)
def test_exactness(dtype, device, backend, record_property):
    judge(exactness_figures(op_check.exactness(dtype, torch.device(device), backend), dtype), record_property, True)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_speed(dtype, device, backend, record_property):
    small = {} if device == "cuda" else {"shape": (4, 8, 49, 16, 64), "repeats": 3}
    backends = list(dict.fromkeys([backend, "torch"]))
    judge(speed_figures(op_check.speed(dtype, torch.device(device), backends, **small)), record_property, True)
