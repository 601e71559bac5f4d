"""The kernels that are compiled for a CPU: the same bits however they are called, and what happens without a compiler.

That they are right is in test_scores.py, and what memory they take in test_peak_memory.py.
"""

import logging

import pytest
import torch

from ds_cmli.cmli import chunked, cmli_peak_bytes, cmli_scores
from ds_cmli.cmli.chunked import kernels
from ds_cmli.cmli.inputs import Sides
from tests.cmli.helpers import allocator_peak, random_case, upstream_for, with_gradients, without_kernels

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no C++ compiler")
RECOMPUTE = {"recompute": True}


def few(shape, share, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_and_budgets_give_the_same_scores(threads, dtype):
    """Threads the same bits of gradients, too."""
    case = random_case(30, 70, 37, 20, 33, dtype=dtype, masked=True)
    upstream, result = upstream_for(case), []
    for number in (1, 2, 5):
        threads(number)
        result += [with_gradients(case, upstream, **options) for options in ({}, RECOMPUTE)]
        small = with_gradients(case, upstream, scratch_bytes=100)
        assert all(map(torch.equal, small[:2], result[0][:2]))
    assert all(torch.equal(a, b) for item in result for a, b in zip(item, result[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_pairs_with_a_gradient_alone_give_the_bits_of_all(share, dtype, monkeypatch):
    """Argmax positions of an image at a time and of all pairs; padded and empty texts, empty images, equal features."""
    for seed in range(4):
        case = random_case(11, 40, 20, 8, 17, seed, dtype, masked=seed % 2 == 0)
        if seed > 1:
            case = (*(x.round() for x in case[:2]), *case[2:])
        upstream = tuple(g.to(dtype) * few((11, 40), share, seed) for g in upstream_for(case, seed))
        alone = with_gradients(case, upstream, **RECOMPUTE)[2:]
        saved = with_gradients(case, upstream)[2:]
        with monkeypatch.context() as patch:
            patch.setattr(kernels.Kernels, "_few", lambda *_: False)
            of_all = with_gradients(case, upstream, **RECOMPUTE)[2:]
        exact = with_gradients(case, upstream, backend="reference")[2:]
        for one, other, third, right in zip(alone, saved, of_all, exact, strict=True):
            assert torch.equal(one, other) and torch.equal(one, third)
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
            torch.testing.assert_close(one, right, rtol=tolerance, atol=tolerance)


def test_argmax_positions_are_those_of_the_operators():
    """Through the gradient: whole numbers, of which sums are exact and many similarities equal."""
    case = random_case(9, 11, 18, 13, 3, dtype=torch.float32, masked=True)
    case = (*(x.round() for x in case[:2]), *case[2:])
    upstream = tuple(g.round() for g in upstream_for(case))
    result = with_gradients(case, upstream)
    with without_kernels():
        expected = with_gradients(case, upstream)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("patches", [3, 20])  # fewer than a vector has, and more
def test_the_first_nan_wins(patches):
    case = random_case(2, 3, patches, 5, 6, dtype=torch.float32, text_lengths=[5, 5, 5])
    case[0][0, [1, 2]] = torch.nan
    ones = torch.ones(2, 3), torch.ones(2, 3)
    scores = with_gradients(case, ones)[:2]
    assert all(s[0].isnan().all() and s[1].isfinite().all() for s in scores)
    # Of image 0 only patch 1 is found by tokens, whose gradient it makes NaN; its own is of finite tokens.
    d_image = with_gradients(case, (torch.zeros(2, 3), torch.ones(2, 3)))[2]
    assert d_image.isfinite().all() and d_image[0, 1].any() and not d_image[0, [0, *range(2, patches)]].any()


@pytest.mark.parametrize("share", [0.02, 0.3])
@pytest.mark.parametrize("recompute", [False, True])
def test_fewer_pairs_take_no_more_memory_than_all(share, recompute):
    case = random_case(48, 200, 20, 16, 64, 0, torch.float32, [16] + [2] * 199)
    upstream = [g.float() * few((48, 200), share) for g in upstream_for(case)]
    image, text = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    scores = cmli_scores(image, text, case[2], recompute=recompute)
    held = allocator_peak(lambda: torch.autograd.grad(scores, (image, text), upstream, retain_graph=True))
    sizes = (48, 200, 20, 16, 64, torch.float32)
    assert held == cmli_peak_bytes(*sizes, recompute=recompute, text_lengths=[16] + [2] * 199).backward


def test_without_a_compiler_pytorch_s_operators_do_it(monkeypatch, tmp_path, caplog):
    case = random_case(4, 5, 6, 7, 8, dtype=torch.float32)
    expected = cmli_scores(*case)
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    load = kernels.load.__wrapped__
    with caplog.at_level(logging.INFO):
        assert load() is None
    assert "runs without kernels of its own: kernels.cpp is compiled at its first use" in caplog.text
    with without_kernels():
        for a, b in zip(chunked.forward(Sides(*case), 2**20, False)[:2], expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("instructions", [*kernels.INSTRUCTIONS.values(), []])
def test_compiled_for_every_processor_it_gives_the_same(instructions, monkeypatch):
    """As far as this one runs it: the loops for longer vectors, shorter ones, and none of their own."""
    capable = torch.backends.cpu.get_cpu_capability()
    if instructions and list(kernels.INSTRUCTIONS).index(capable) > list(kernels.INSTRUCTIONS.values()).index(
        instructions
    ):
        pytest.skip(f"this processor has {capable}")
    case = random_case(7, 9, 21, 10, 19, dtype=torch.float32, masked=True)
    upstream = upstream_for(case)
    expected = with_gradients(case, upstream)
    monkeypatch.setitem(kernels.INSTRUCTIONS, capable, instructions)
    other = kernels.load.__wrapped__()
    monkeypatch.setattr(kernels, "load", lambda: other)
    for a, b in zip(with_gradients(case, upstream, recompute=True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
