"""The formulas of what operators hold inside are those of PyTorch's own allocator."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.null_gpu
CARDS = ("t4", "3090", "a100", "h100", "b200", "5090")


@pytest.mark.parametrize(
    "card", ["3090", *(pytest.param(card, marks=pytest.mark.soak) for card in CARDS if card != "3090")]
)
def test_what_operators_hold_inside(null_gpu, card):
    command = [sys.executable, "-m", "tests.null_gpu.compare_operators"]
    done = subprocess.run(command, env=null_gpu(card), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
