"""What the answer adds to a program's events."""

import pytest

from ds_cmli.fake_cuda import answer
from ds_cmli.fake_cuda.answer import Room, on_device, with_cublas
from ds_cmli.memory_model import gpus
from ds_cmli.memory_model.blocks import Event

PRODUCT = "aten.mm.default"


@pytest.mark.parametrize("room, reserved, retries", [(80, 80, 0), (79, 50, 1), (50, 50, 1), (49, 80, 0)])
def test_a_program_may_fit_as_the_cache_is_returned(room, reserved, retries):
    """30 MiB that are free again are too small for 50; without a limit both are kept, 80 in all."""
    events = [Event(block, size << 20, "other", "forward") for block, size in ((0, 30), (0, -30), (1, 50))]
    outside = gpus.device_bytes(0, "T4", 2)
    replayed, occupied = on_device(events, Room("T4", (room << 20) + outside), 2)
    assert (occupied, replayed.reserved_peak, replayed.retries) == (
        (reserved << 20) + outside, reserved << 20, retries
    )  # fmt: skip


def test_workspaces_of_a_product_alone(monkeypatch):
    """As on the null GPU with PyTorch 2.15: 8,519,680 B for a product, 1 MiB for one with a bias."""
    monkeypatch.setattr(answer, "KEEPS_WORKSPACES", False)
    events = [
        Event(0, 10, "activations", "forward", PRODUCT),
        Event(1, 10, "activations", "forward", "aten.addmm.default"),
    ]
    own = [
        Event(block, size, "temporaries", "forward", "cuBLAS")
        for block, most in ((-1, 8_519_680), (-2, 1 << 20))
        for size in (most, -most)
    ]
    assert with_cublas(events, 2 * 8_519_680) == [events[0], *own[:2], events[1], *own[2:]]


def test_where_cublas_takes_its_workspaces(monkeypatch):
    monkeypatch.setattr(answer, "KEEPS_WORKSPACES", True)  # before PyTorch 2.15
    events = [
        Event(0, 10, "activations", "forward"),
        Event(1, 10, "activations", "forward", PRODUCT),
        Event(2, 10, "temporaries", "backward"),
        Event(2, -10, "temporaries", "backward"),
        Event(3, 10, "gradients", "backward", PRODUCT),
    ]
    forward, backward = (
        Event(-block, 50, "temporaries", phase, "cuBLAS") for block, phase in ((1, "forward"), (2, "backward"))
    )
    assert with_cublas(events, 100) == [*events[:2], forward, *events[2:], backward]
    # Backward's first product is written into block 2, before that is freed.
    assert with_cublas(events, 100, {(True, 0): 3}) == [*events[:2], forward, events[2], backward, *events[3:]]
    # A closure's passes run in an optimizer's step; a side stream has a workspace of its own.
    events = [Event(0, 10, "other", "optimizer", PRODUCT), Event(1, 10, "other", "forward", PRODUCT, 7)]
    of_step = Event(-1, 50, "temporaries", "optimizer", "cuBLAS")
    assert with_cublas(events, 100) == [
        events[0], of_step, events[1], Event(-2, 50, "temporaries", "forward", "cuBLAS", 7)
    ]  # fmt: skip
