"""What a call of `cmli_scores` allocates at its peak, which an opaque operator hides: its backend
runs on tensors without data.

Shape legend: I images, J texts, N patches, M text positions (padded), D features.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_cmli.cmli.backends import backend_of
from ds_cmli.cmli.inputs import DEFAULT_SCRATCH_BYTES, Sides, Wanted
from ds_cmli.cmli.without_data import Assumed, assuming
from ds_cmli.fits.recorder import Recorder


class PeakBytes(NamedTuple):
    """Bytes that one call requests from the allocator, at the most, beyond its arguments.

    forward: during forward, scores and saved argmax indices included.
    saved: the argmax indices, which stay until backward (the inputs, which autograd also keeps, not
        counted).
    backward: during backward, the gradients it returns included, the saved indices not.
    gradients: of these, the gradients returned.
    extra: over both, beyond inputs and their gradients; the scores and the gradients that come in
        for them included.
    largest: the largest tensor of forward: argmax indices or scores of all pairs, or tiles of
        similarities, whose size does not grow with the batch.
    """

    forward: int
    saved: int
    backward: int
    gradients: int
    extra: int
    largest: int


def cmli_peak_bytes(
    I: int,  # noqa: E741
    J: int,
    N: int,
    M: int,
    D: int,
    dtype: torch.dtype,
    *,
    backend: str = "chunked",
    device: str = "cpu",
    recompute: bool = False,
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
    text_lengths: Sequence[int] | None = None,
    image_lengths: Sequence[int] | None = None,
    limits: tuple[tuple[int, int], int] | None = None,
) -> PeakBytes:
    """Peak memory of `cmli_scores` and its backward, both inputs requiring gradients, for
    contiguous arguments.

    Args:
        I, J, N, M, D, dtype: shapes and dtype of image [I, N, D] and text [J, M, D].
        device: its type. The chunked backend has kernels of its own for "cpu", which take less
            memory, if it finds a compiler here.
        recompute, scratch_bytes: as given to `cmli_scores`.
        text_lengths: valid tokens of each text; None = the most that any lengths need (a few
            percent above all M).
        image_lengths: valid patches of each image, where an image_mask is given; None = no
            image_mask.
        limits: compute capability and shared memory of a block, in bytes, of the GPU that triton's
            tiles are for; None = the current one, or an A100 where there is none.

    Equal to the allocator's count on a CPU, but for what PyTorch's operators hold inside, which is
    little next to a tile: products (oneDNN: about 65 KB a thread at D=256), and sorts. On a GPU the
    allocator rounds each buffer up to 512 bytes.

    Raises:
        ValueError: a backend whose memory is not known, or lengths that are not one number for each
            sequence.
    """
    if backend not in ("chunked", "triton"):
        raise ValueError(f"backend={backend!r}: peak memory is known for chunked and triton")
    lengths: list[int] = []
    for name, given, number, most in (
        ("text_lengths", text_lengths or [M] * J, J, M),
        ("image_lengths", image_lengths or [], I, N),
    ):
        if given and (len(given) != number or min(given) < 0 or max(given) > most):
            raise ValueError(f"{name} must hold {number} numbers from 0 to {most}")
        lengths += given
    known = Assumed(lengths, text_lengths is None, device, limits)
    with FakeTensorMode(), assuming(known):
        mask = None if image_lengths is None else torch.empty(I, N, dtype=torch.bool)
        features = torch.empty(I, N, D, dtype=dtype), torch.empty(J, M, D, dtype=dtype)
        sides = Sides(*features, torch.empty(J, M, dtype=torch.bool), mask)
        grads = sides.new_results(False)[:2]
        scores = 4 * grads[1].nbytes  # with their gradients
        of = backend_of(backend, *features)
        forward, largest, out = _peak(
            lambda: of.forward(sides, scratch_bytes, not recompute), sides[:4]
        )
        argmax = out[2], out[3]
        saved = argmax[0].nbytes + argmax[1].nbytes
        wanted = Wanted(True, True)
        backward, _, gradients = _peak(
            lambda: of.backward(sides, grads, argmax, wanted, scratch_bytes),
            (*sides[:4], *grads, *argmax),
        )
        returned = gradients[0].nbytes + gradients[1].nbytes
    # When backward groups, the scores and their gradients are there as well.
    extra = max(forward, scores + saved + backward - returned)
    return PeakBytes(forward, saved, backward, returned, extra, largest)


def _peak(
    call: Callable[[], tuple[Tensor, ...]], arguments: Iterable[Tensor | None]
) -> tuple[int, int, tuple[Tensor, ...]]:
    """The most bytes that a call holds beyond its arguments, its largest tensor, its results."""
    recorder = Recorder()
    recorder.claim("arguments", arguments)
    before = len(recorder.log)
    with recorder:
        out = call()
    sizes = [event.bytes for event in recorder.log[before:]]
    return max(accumulate(sizes)), max(sizes), out
