"""What the answer adds to a program's events."""

from ds_cmli.allocator.blocks import Event
from ds_cmli.fits.answer import with_cublas

PRODUCT = "aten.mm.default"


def test_where_cublas_takes_its_workspaces():
    events = [
        Event(0, 10, "activations", "forward"),
        Event(1, 10, "activations", "forward", PRODUCT),
        Event(2, 10, "temporaries", "backward"),
        Event(2, -10, "temporaries", "backward"),
        Event(3, 10, "gradients", "backward", PRODUCT),
    ]
    forward, backward = (
        Event(-block, 50, "temporaries", phase, "cuBLAS") for block, phase in ((2, "forward"), (1, "backward"))
    )
    assert with_cublas(events, 100) == [*events[:2], forward, *events[2:], backward]
    # Backward's first product is written into block 2, before that is freed.
    assert with_cublas(events, 100, {"backward": 3}) == [*events[:2], forward, events[2], backward, *events[3:]]
