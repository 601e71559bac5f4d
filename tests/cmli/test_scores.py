"""`cmli_scores` by hand-worked numbers and against the fp64 reference."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.chunked import tiling
from ds_cmli.cmli.reference import cmli_scores_reference
from tests.cmli.helpers import (
    any_layout_gives_the_same,
    random_case,
    upstream_for,
    with_gradients,
    without_kernels,
)

BACKENDS = ["reference", "chunked"]
# Largest error relative to the largest value, fp64 arithmetic on the same (rounded) inputs as the yardstick: fp32 sums,
# and for 16 bits the rounding of the gradient returned.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module", autouse=True, params=["kernels", "operators"])
def kernels(request):
    """All tests with the kernels that are compiled for a CPU, and with PyTorch's operators in their place."""
    with nullcontext() if request.param == "kernels" else without_kernels():
        yield


# One image with two patches, (1, 0) and (0, 2); two texts: tokens (3, 1), (1, -1), and token (-1, -1).
#     S of text 0:  patch 0: 3  1    patch 1: 2 -2        S of text 1:  patch 0: -1   patch 1: -2
IMAGE = [[[1.0, 0.0], [0.0, 2.0]]]
TEXT = [[[3.0, 1.0], [1.0, -1.0]], [[-1.0, -1.0], [50.0, 50.0]]]
MASK = [[True, True], [True, False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_and_gradients_by_hand(backend):
    image = torch.tensor(IMAGE, requires_grad=True)
    text = torch.tensor(TEXT, requires_grad=True)
    s_i2t, s_t2i = cmli_scores(image, text, torch.tensor(MASK), backend=backend)
    assert s_i2t.tolist() == [[(3 + 2) / 2, (-1 - 2) / 2]]
    assert s_t2i.tolist() == [[(3 + 1) / 2, -1]]  # padding of text 1 (50, 50) wins nothing

    s_i2t.sum().backward()
    # Patch 0 won by token 0 of text 0 and of text 1, patch 1 likewise; each weighs 1/2.
    assert image.grad.tolist() == [[[(3 - 1) / 2, (1 - 1) / 2], [(3 - 1) / 2, (1 - 1) / 2]]]
    assert text.grad.tolist() == [[[0.5, 1.0], [0.0, 0.0]], [[0.5, 1.0], [0.0, 0.0]]]

    image.grad = text.grad = None
    cmli_scores(image, text, torch.tensor(MASK), backend=backend)[1].sum().backward()
    # Tokens (3, 1), (1, -1) and (-1, -1) all found patch 0; the last text has one token, which weighs 1.
    assert image.grad.tolist() == [[[3 / 2 + 1 / 2 - 1, 1 / 2 - 1 / 2 - 1], [0.0, 0.0]]]
    assert text.grad.tolist() == [[[0.5, 0.0], [0.5, 0.0]], [[1.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_on_both_sides_by_hand(backend):
    image = torch.tensor([[[9.0], [1.0], [2.0]]])
    text = torch.tensor([[[7.0], [-1.0], [-3.0]]])
    image_mask, token_mask = torch.tensor([[False, True, True]]), torch.tensor([[False, True, True]])
    # S over valid ones: patch 1: -1 -3, patch 2: -2 -6.
    s_i2t, s_t2i = cmli_scores(image, text, token_mask, image_mask, backend=backend)
    assert (s_i2t.item(), s_t2i.item()) == (-1.5, -2.0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(backend, recompute):
    image = torch.ones(2, 3, 4, requires_grad=True)  # every similarity is 4: exact in any order of summation
    text = torch.ones(2, 5, 4, requires_grad=True)
    mask = torch.tensor([[False, True, True, False, True], [True] * 5])
    s_i2t, s_t2i = cmli_scores(image, text, mask, backend=backend, recompute=recompute)
    (s_i2t.sum() + s_t2i.sum()).backward()
    assert s_i2t.eq(4).all() and s_t2i.eq(4).all()
    # All tokens find patch 0: 2 texts, each with weights adding up to 1. Each patch finds 2 tokens at weight 1/3.
    torch.testing.assert_close(image.grad[0, :, 0], torch.tensor([2 + 2 / 3, 2 / 3, 2 / 3]))
    # All patches find the first valid token: 2 images. Each valid token finds a patch in 2 images.
    torch.testing.assert_close(text.grad[0, :, 0], torch.tensor([0, 2 + 2 / 3, 2 / 3, 0, 2 / 3]))
    torch.testing.assert_close(text.grad[1, :, 0], torch.tensor([2 + 2 / 5, 2 / 5, 2 / 5, 2 / 5, 2 / 5]))


def equal_to_reference(case, dtype, **options):
    """Scores and gradients of `case` in `dtype` against fp64 arithmetic on the same rounded numbers."""
    case = (case[0].to(dtype), case[1].to(dtype), *case[2:])
    wide = torch.promote_types(dtype, torch.float32)
    upstream = tuple(g.to(wide) for g in upstream_for(case))
    exact = with_gradients(
        (case[0].double(), case[1].double(), *case[2:]), tuple(g.double() for g in upstream), backend="reference"
    )
    results = with_gradients(case, upstream, **options)
    for k, (got, want) in enumerate(zip(results, exact, strict=True)):
        assert got.dtype == (wide if k < 2 else dtype)
        tolerance = TOLERANCE[dtype] if k > 1 else min(TOLERANCE[dtype], 1e-5)
        error = (got.double() - want).abs().max().item()
        assert error <= tolerance * max(1.0, want.abs().max().item()), (k, error)


@st.composite
def cases(draw):
    """Shapes odd and even, texts of length 0 and 1, holes on both sides, ties by repeated features."""
    I, J = draw(st.integers(1, 6)), draw(st.integers(1, 7))  # noqa: E741
    N, M, D = draw(st.integers(1, 33)), draw(st.integers(1, 19)), draw(st.integers(1, 20))
    lengths = draw(st.lists(st.sampled_from([0, 1, M // 2, M]), min_size=J, max_size=J))
    case = random_case(I, J, N, M, D, draw(st.integers(0, 2**16)), text_lengths=lengths, masked=draw(st.booleans()))
    image, text, token_mask, image_mask = case
    # Multiples of 1/4 up to 2: products and sums are exact in every dtype, so equal similarities are bit-equal, and
    # no two others are closer than rounding.
    image, text = (image * 2).round().clamp(-4, 4) / 2, (text * 2).round().clamp(-4, 4) / 2
    if draw(st.booleans()):  # or no ties: distinct to 1/16, products far apart
        image, text = random_distinct(image), random_distinct(text)
    if image_mask is not None and draw(st.booleans()):
        image_mask[0] = False
    return image, text, token_mask, image_mask


def random_distinct(x):
    """Numbers that bf16 and fp16 hold exactly, seldom equal."""
    g = torch.Generator().manual_seed(x.numel())
    return torch.randint(-127, 128, x.shape, generator=g).double() / 32


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    case=cases(),
    dtype=st.sampled_from(list(TOLERANCE)),
    scratch_bytes=st.sampled_from([1, 5_000, 2**26]),
    recompute=st.booleans(),
)
def test_chunked_equals_reference(case, dtype, scratch_bytes, recompute):
    equal_to_reference(case, torch.float64, scratch_bytes=scratch_bytes, recompute=recompute)
    equal_to_reference(case, dtype, scratch_bytes=scratch_bytes, recompute=recompute)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sides_longer_than_uint8(dtype):
    case = random_case(2, 3, 300, 270, 3, text_lengths=[270, 257, 1])
    equal_to_reference((random_distinct(case[0]), random_distinct(case[1]), *case[2:]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_tiles_of_the_usual_size(dtype):
    case = random_case(40, 70, 100, 40, 32, text_lengths=[(7 * j) % 41 for j in range(70)])
    equal_to_reference((random_distinct(case[0]), random_distinct(case[1]), *case[2:]), dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(masked, recompute):
    image, text, token_mask, image_mask = random_case(3, 4, 5, 6, 4, masked=masked, text_lengths=[6, 0, 1, 3])

    def scores(image, text):
        return cmli_scores(image, text, token_mask, image_mask, recompute=recompute, scratch_bytes=2_000)

    assert torch.autograd.gradcheck(scores, (image.requires_grad_(), text.requires_grad_()))


@pytest.mark.parametrize("recompute", [False, True])
def test_same_bits_twice(recompute):
    case = random_case(20, 30, 50, 20, 32, dtype=torch.float32, masked=True)
    upstream = upstream_for(case)
    first, second = (with_gradients(case, upstream, recompute=recompute, scratch_bytes=400_000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scratch_bytes", [1, 50_000, 400_000])
def test_other_tiles_change_nothing_above_1e_6(scratch_bytes, recompute):
    case = random_case(20, 30, 50, 20, 32, dtype=torch.float32, masked=True)
    case = tuple(torch.nn.functional.normalize(x, dim=-1) for x in case[:2]) + case[2:]
    upstream = tuple(g / 30 for g in upstream_for(case))
    usual = with_gradients(case, upstream)
    for a, b in zip(
        with_gradients(case, upstream, scratch_bytes=scratch_bytes, recompute=recompute), usual, strict=True
    ):
        assert (a - b).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_masked_never_matters(backend):
    """Not even NaN; an empty text and an empty image score 0, with zero gradient."""
    case = random_case(3, 4, 6, 5, 4, masked=True, text_lengths=[0, 1, 5, 3])
    case[3][2] = False
    poisoned = (
        case[0].masked_fill(~case[3][..., None], torch.nan),
        case[1].masked_fill(~case[2][..., None], torch.inf),
    )
    upstream = upstream_for(case)
    results = with_gradients((*poisoned, *case[2:]), upstream, backend=backend)
    for got, want in zip(results, with_gradients(case, upstream, backend="reference"), strict=True):
        torch.testing.assert_close(got, want)
    s_i2t, s_t2i, d_image, d_text = results
    for scores in (s_i2t, s_t2i):
        assert not scores[:, 0].any() and not scores[2].any()
    assert not d_text[0].any() and not d_image[2].any()
    assert not d_text[~case[2]].any() and not d_image[~case[3]].any()


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_gives_the_same(backend, onednn, monkeypatch):
    monkeypatch.setattr(tiling, "ONEDNN", onednn)
    any_layout_gives_the_same(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_texts_empty(backend):
    case = random_case(2, 3, 4, 5, 6, text_lengths=[0, 0, 0])
    assert not any(x.any() for x in with_gradients(case, upstream_for(case), backend=backend))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("recompute", [False, True])
def test_nan_and_inf_propagate(value, recompute):
    image, text, mask, _ = random_case(3, 4, 6, 5, 4, text_lengths=[5, 1, 4, 5])
    image[1] = value
    results = with_gradients((image, text, mask, None), upstream_for((image, text, mask, None)), recompute=recompute)
    assert not results[0][1].isfinite().any() and not results[1][1].isfinite().any()
    assert results[0][[0, 2]].isfinite().all() and results[1][[0, 2]].isfinite().all()
    text[2, 3] = value
    with_gradients((image, text, mask, None), upstream_for((image, text, mask, None)), recompute=recompute)


def test_only_the_gradient_asked_for():
    case = random_case(3, 4, 6, 5, 4)
    upstream = upstream_for(case)
    both = with_gradients(case, upstream)
    for side in range(2):
        inputs = [x.clone().requires_grad_(k == side) for k, x in enumerate(case[:2])]
        (grad,) = torch.autograd.grad(cmli_scores(*inputs, *case[2:]), inputs[side], upstream)
        assert torch.equal(grad, both[2 + side])


@pytest.mark.parametrize("which", [0, 1])
def test_one_score_alone(which):
    """The other score's gradient never arrives."""
    case = random_case(3, 4, 6, 5, 4)
    upstream = upstream_for(case)
    inputs = [x.clone().requires_grad_() for x in case[:2]]
    grads = torch.autograd.grad(cmli_scores(*inputs, *case[2:])[which], inputs, upstream[which])
    alone = tuple(g if k == which else torch.zeros_like(g) for k, g in enumerate(upstream))
    for got, want in zip(grads, with_gradients(case, alone, backend="reference")[2:], strict=True):
        torch.testing.assert_close(got, want)


def test_strided_inputs_and_gradients():
    case = random_case(3, 4, 6, 5, 4, text_lengths=[1, 5, 4, 5])
    strided = tuple(x.transpose(0, 2).contiguous().transpose(0, 2) for x in case[:2]) + case[2:]
    ones = torch.ones(()).expand(3, 4)
    for a, b in zip(with_gradients(strided, (ones, ones)), with_gradients(case, (ones, ones)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_is_twice_differentiable():
    """Plain autograd: nothing custom stands between the oracle and the equations."""
    image, text, mask, _ = random_case(2, 3, 4, 5, 6, text_lengths=[5, 1, 3])
    torch.autograd.gradgradcheck(
        lambda v, w: cmli_scores_reference(v, w, mask), (image.requires_grad_(), text.requires_grad_())
    )
