"""`cmli_peak_bytes` against the allocator, to the byte, and the memory the op promises not to exceed."""

from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch

from ds_cmli.cmli import chunked, cmli_peak_bytes, cmli_scores
from ds_cmli.cmli.inputs import Sides, Wanted
from ds_cmli.memory.tracker import MemoryTracker
from tests.cmli.helpers import allocator_peak, random_case, without_kernels

# With the kernels that are compiled for a CPU, or with PyTorch's operators, as in 16 bits always.
WAYS = [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False), (torch.float64, True)]
SHAPES = {
    "small": {"I": 24, "J": 37, "N": 49, "M": 30, "D": 64},
    "long patches": {"I": 6, "J": 20, "N": 300, "M": 17, "D": 32},
    "usual patches": {"I": 20, "J": 24, "N": 196, "M": 64, "D": 64},
}


@pytest.fixture(autouse=True)
def no_hidden_workspace(monkeypatch):
    """torch.mm's product takes no memory of its own; oneDNN's takes some."""
    monkeypatch.setattr("ds_cmli.cmli.chunked.tiling.ONEDNN", False)


@pytest.fixture
def operators_measured(monkeypatch):
    """What sorts and bags hold inside, as a prediction measures it."""
    monkeypatch.setattr("ds_cmli.cmli.peak_memory.Recorder", partial(MemoryTracker, workspaces=True))


AXES = ([*SHAPES], ["all valid", "masked"], [2**19, 2**26], [False, True], WAYS)
# A third of all, in which any two values meet.
CASES = [
    tuple(axis[place] for axis, place in zip(AXES, places, strict=True))
    for places in product(*(range(len(axis)) for axis in AXES))
    if sum(places) % 3 == 0
]


@pytest.mark.slow
@pytest.mark.parametrize("shape, lengths, scratch_bytes, recompute, way", CASES)
def test_equal_to_the_allocator(operators_measured, shape, lengths, scratch_bytes, recompute, way):
    dtype, compiled = way
    with nullcontext() if compiled else without_kernels():
        equal_to_the_allocator(shape, lengths, scratch_bytes, recompute, dtype)


def equal_to_the_allocator(shape, lengths, scratch_bytes, recompute, dtype):
    sizes = SHAPES[shape]
    I, J, N, M = sizes["I"], sizes["J"], sizes["N"], sizes["M"]  # noqa: E741
    text_lengths = [M] * J if lengths == "all valid" else [(7 * j) % (M + 1) for j in range(J)]
    image_lengths = None if lengths == "all valid" else [(11 * i) % (N + 1) for i in range(I)]
    image, text, token_mask, _ = random_case(**sizes, dtype=dtype, text_lengths=text_lengths)
    image_mask = None if image_lengths is None else torch.arange(N) < torch.tensor(image_lengths)[:, None]
    grads = [torch.randn(I, J, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
    predicted = cmli_peak_bytes(
        **sizes,
        dtype=dtype,
        recompute=recompute,
        scratch_bytes=scratch_bytes,
        text_lengths=text_lengths,
        image_lengths=image_lengths,
    )
    out = []
    inputs = (image, text, token_mask, image_mask)
    forward = allocator_peak(lambda: out.extend(chunked.forward(Sides(*inputs), scratch_bytes, not recompute)))
    assert forward == predicted.forward
    assert sum(arg.nbytes for arg in out[2:]) == predicted.saved
    backward = allocator_peak(
        lambda: chunked.backward(Sides(*inputs), grads, out[2:], Wanted(True, True), scratch_bytes)
    )
    assert backward == predicted.backward
    assert predicted.gradients == image.nbytes + text.nbytes


@pytest.mark.parametrize("scratch_bytes", [2**18, 2**26])  # backward holds most, forward holds most
def test_a_whole_step_needs_what_is_predicted(scratch_bytes):
    """Through autograd, the scores' gradients included: nothing else is held between forward and backward."""
    sizes = {"I": 24, "J": 48, "N": 49, "M": 30, "D": 64}
    image, text, mask, _ = random_case(**sizes, dtype=torch.float32, text_lengths=[30] * 48)
    image.requires_grad_(), text.requires_grad_()

    def step():
        scores = cmli_scores(image, text, mask, scratch_bytes=scratch_bytes)
        torch.autograd.grad(scores, (image, text), [torch.ones_like(s) for s in scores])

    peak = cmli_peak_bytes(**sizes, dtype=torch.float32, scratch_bytes=scratch_bytes, text_lengths=[30] * 48)
    scores = 2 * 24 * 48 * 4
    assert allocator_peak(step) == max(peak.forward, 2 * scores + peak.saved + peak.backward)
    assert peak.extra == max(peak.forward, 2 * scores + peak.saved + peak.backward - peak.gradients)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scratch_bytes", [pytest.param(2**20, marks=pytest.mark.slow), 2**23, 2**26])
def test_scratch_stays_within_the_budget(scratch_bytes, recompute):
    """Beyond scores, argmax and gradients: the budget, tables of a few bytes a position, an fp32 text gradient."""
    N, M, D = 196, 64, 256
    for G in (32, 128, 512):
        peak = cmli_peak_bytes(G, G, N, M, D, torch.bfloat16, recompute=recompute, scratch_bytes=scratch_bytes)
        scores, tables, text_sum = 2 * G * G * 4, G * (48 + M * 12 + N * 12), G * M * D * 4 if recompute else 0
        argmax_of_one_image = G * (N + M) if recompute else 0
        room = scratch_bytes + max(0, argmax_of_one_image - scratch_bytes // 2)
        assert peak.forward - peak.saved - scores <= room + tables
        assert peak.backward - peak.gradients <= room + tables + text_sum


def test_the_documented_setting_fits():
    """One rank of two: 256 images, 512 texts; and all of it in one process."""
    setting = {"N": 196, "M": 64, "D": 256, "dtype": torch.bfloat16}
    assert cmli_peak_bytes(256, 512, **setting).extra <= 150e6
    assert cmli_peak_bytes(256, 512, **setting, recompute=True, scratch_bytes=32 * 2**20).extra <= 80e6
    assert cmli_peak_bytes(512, 512, **setting).extra <= 200e6


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scratch_bytes", [2**20, 2**26])
def test_unknown_lengths_are_an_upper_bound(scratch_bytes, recompute):
    setting = {"N": 49, "M": 64, "D": 64, "dtype": torch.bfloat16, "recompute": recompute}
    bound = cmli_peak_bytes(64, 128, **setting, scratch_bytes=scratch_bytes)
    for lengths in ([64] * 128, [1] * 128, [0] * 128, [3 + (j * j) % 20 for j in range(127)] + [62]):
        peak = cmli_peak_bytes(64, 128, **setting, scratch_bytes=scratch_bytes, text_lengths=lengths)
        assert all(a <= b for a, b in zip(peak, bound, strict=True)), lengths
    assert (
        bound.extra
        < 1.3 * cmli_peak_bytes(64, 128, **setting, scratch_bytes=scratch_bytes, text_lengths=[64] * 128).extra
    )


def test_bad_lengths_are_named():
    with pytest.raises(ValueError, match="text_lengths must hold 3 numbers from 0 to 5"):
        cmli_peak_bytes(2, 3, 4, 5, 6, torch.float32, text_lengths=[1, 2])
    with pytest.raises(ValueError, match="backend='reference': peak memory is known for chunked and triton"):
        cmli_peak_bytes(2, 3, 4, 5, 6, torch.float32, backend="reference")


def test_triton_s_tiles_are_those_of_the_gpu_that_is_named():
    setting = (256, 512, 196, 64, 256, torch.bfloat16)
    a100, rtx_3090 = ((8, 0), 163 * 1024), ((8, 6), 99 * 1024)
    chosen = {"backend": "triton", "scratch_bytes": 2**28}  # enough for all pairs at once
    peak = [cmli_peak_bytes(*setting, limits=limits, **chosen).forward for limits in (a100, rtx_3090)]
    # 99 KB hold 128 of 196 patches: partial results of two blocks of patches, for all pairs.
    partial_results = 256 * 512 * 2 * (4 + 64 * (4 + 1))
    assert partial_results <= peak[1] - peak[0] < partial_results + 2**12  # and lists of tiles
