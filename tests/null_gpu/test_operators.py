"""The formulas of what operators hold inside are those of PyTorch's own allocator."""

import pytest

from tests.null_gpu.processes import run

pytestmark = pytest.mark.null_gpu


def test_what_operators_hold_inside(null_gpu):
    done = run(null_gpu("3090"), "-m", "tests.null_gpu.compare_operators")
    assert done.returncode == 0, done.stdout + done.stderr


def test_which_attention_is_chosen(null_gpu):
    done = run(null_gpu("h100"), "-m", "tests.null_gpu.compare_attention", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
