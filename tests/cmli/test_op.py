"""The all-pairs op by hand, and its backends on random cases against the fp64 reference."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.cmli import cmli_scores, cpu, op
from ds_cmli.cmli.reference import cmli_scores_reference
from tests.cmli.cases import case, check, with_gradients

IMAGE = torch.randn(3, 20, 8)
TEXT = torch.randn(4, 6, 8)
MASK = torch.ones(4, 6, dtype=torch.bool)


@pytest.fixture(params=["cpu", "torch", "reference"])
def scores(request):
    return cmli_scores_reference if request.param == "reference" else partial(cmli_scores, backend=request.param)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_cases_have_the_scores_and_gradients_of_the_equations(scores, first):
    for seed in range(first, first + 20):
        check(scores, case(seed))
        if seed < 4:  # fp64 throughout
            check(scores, case(seed, dtype=torch.float64))


def test_padding_does_not_beat_negative_similarities(scores):
    token_mask = torch.arange(6) < torch.tensor([[1], [4], [6]])
    patch_mask = torch.arange(5) < torch.tensor([[2], [5]])
    s_i2t, s_t2i = scores(torch.ones(2, 5, 4), -torch.ones(3, 6, 4), token_mask, patch_mask)
    assert s_i2t.unique().item() == s_t2i.unique().item() == -4.0


@pytest.mark.parametrize("N, M", [(1, 1), (3, 3), (40, 3), (40, 7), (2, 40)])
def test_a_tie_goes_to_the_lowest_valid_index(scores, N, M):
    """All similarities are equal, so each maximum's gradient goes to the first valid position."""
    image, text = (torch.ones(*shape, 4, requires_grad=True) for shape in ((2, N), (3, M)))
    token_mask, patch_mask = (torch.ones(shape, dtype=torch.bool) for shape in ((3, M), (2, N)))
    token_mask[1, 0] = M == 1  # where there are more, the first of some does not count
    patch_mask[1, 0] = N == 1
    s_i2t, s_t2i = scores(image, text, token_mask, patch_mask)
    d_image, d_text = torch.autograd.grad(s_t2i.sum(), (image, text), retain_graph=True)
    assert (d_image[..., 0].argmax(1) == patch_mask.int().argmax(1)).all()
    assert d_image[..., 0].count_nonzero(1).tolist() == [1, 1]
    assert (d_text[token_mask] != 0).all()
    d_image, d_text = torch.autograd.grad(s_i2t.sum(), (image, text))
    assert (d_text[..., 0].argmax(1) == token_mask.int().argmax(1)).all()
    assert d_text[..., 0].count_nonzero(1).tolist() == [1, 1, 1]
    assert (d_image[patch_mask] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_products_are_summed_in_fp32(scores, dtype):
    # Two patches that rounded sums would not tell apart: the second is better by 1 of 257.
    image = torch.ones(1, 2, 257, dtype=dtype)
    image[0, 0, 0] = 0
    text = torch.ones(1, 1, 257, dtype=dtype)
    _, s_t2i = scores(image, text, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    assert s_t2i.dtype == torch.float32
    assert s_t2i.item() == 257.0


@pytest.mark.parametrize("backend, threads", [("cpu", (1, 1, 2)), ("torch", (1, 1))])
def test_the_same_bits_each_time_and_for_any_number_of_threads(backend, threads):
    threads_before = torch.get_num_threads()
    results = []
    for num_threads in threads:
        torch.set_num_threads(num_threads)
        results.append(with_gradients(partial(cmli_scores, backend=backend), case(7, dtype=torch.float32)))
    torch.set_num_threads(threads_before)
    for result in results:
        assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ((IMAGE[0], TEXT, MASK), "image .* and text .* do not fit"),
        ((IMAGE[..., :7], TEXT, MASK), "do not fit"),
        ((IMAGE[:0], TEXT, MASK), "no pairs of 0 images and 4 texts"),
        ((IMAGE, TEXT[:, :0], MASK[:, :0]), "no positions"),
        ((IMAGE, TEXT, MASK.to("meta")), "token_mask must be bool .* on cpu.* on meta"),
        ((IMAGE.half(), TEXT, MASK), "of one dtype"),
        ((IMAGE.long(), TEXT.long(), MASK), "must be floats"),
        ((IMAGE, TEXT, MASK.long()), "token_mask must be bool"),
        ((IMAGE, TEXT, MASK[:, :5]), "token_mask must be bool"),
        ((IMAGE, TEXT, MASK, MASK), "patch_mask must be bool"),
        ((IMAGE, TEXT, MASK, None, "numpy"), "backend='numpy' is unknown"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        cmli_scores(*arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("compiles", [False, True], ids=["no compiler", "the compiler fails"])
def test_kernels_that_do_not_run_are_replaced_with_a_warning_or_refused(monkeypatch, tmp_path, compiles):
    compiler = tmp_path / "g++"
    reason = "No such file or directory: .*/g[+][+]"
    if compiles:
        compiler.write_text("#!/bin/sh\necho 'x.cpp:1:2: error: no such header' >&2\nexit 1\n")
        compiler.chmod(0o755)
        reason = "/g[+][+] failed with exit code 1: x.cpp:1:2: error: no such header"
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path))
    cached = (cpu.load_kernels, op.why_not_cpu, op._warn)
    for function in cached:
        function.cache_clear()
    try:
        expected = cmli_scores(IMAGE, TEXT, MASK, backend="torch")
        with pytest.warns(UserWarning, match=f"without kernels, and slower: .*{reason}"):
            assert_close(cmli_scores(IMAGE, TEXT, MASK), expected, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match=f"backend='cpu' does not run here: .*{reason}"):
            cmli_scores(IMAGE, TEXT, MASK, backend="cpu")
    finally:
        for function in cached:
            function.cache_clear()


def test_autocast_changes_nothing_but_a_narrower_side():
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(cmli_scores(IMAGE, TEXT, MASK), cmli_scores(IMAGE, TEXT, MASK, backend="cpu"), rtol=0, atol=0)
        mixed = cmli_scores(IMAGE.bfloat16(), TEXT, MASK)
    assert_close(mixed, cmli_scores(IMAGE.bfloat16().float(), TEXT, MASK))


def test_a_second_derivative_is_refused():
    image = IMAGE.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cmli_scores(image, TEXT, MASK)[0].sum(), image, create_graph=True)
