"""The formulas of what operators hold inside are those of PyTorch's own allocator."""

import pytest

from tests.null_gpu.processes import run

pytestmark = pytest.mark.null_gpu
CARDS = ("t4", "3090", "a100", "h100", "b200", "5090")


@pytest.mark.parametrize(
    "card", ["3090", *(pytest.param(card, marks=pytest.mark.soak) for card in CARDS if card != "3090")]
)
def test_what_operators_hold_inside(null_gpu, card):
    done = run(null_gpu(card), "-m", "tests.null_gpu.compare_operators")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "card, count", [("h100", 0), *(pytest.param(card, 20_000, marks=pytest.mark.soak) for card in (*CARDS, "4090"))]
)
def test_which_attention_is_chosen(null_gpu, card, count):
    done = run(null_gpu(card), "-m", "tests.null_gpu.compare_attention", count)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
