"""The sparse backward of the Triton backend against fp64 autograd of what is materialised, run by Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, so the checks run in a process of their own: this file.
"""

import json

import pytest
import torch

from ds_cmli.cmli.inputs import index_dtype
from tests.cmli.helpers import TOLERANCE, distance, failure, in_interpreter, inputs, reference

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def one_side(x, mask, indices, grad):
    from ds_cmli.cmli.triton.gradient import OneSide
    from ds_cmli.cmli.triton.tiles import Sequences

    return OneSide(Sequences(mask, *x.shape[:2], x.device), indices, grad)


def case(I, J, N, M, D, dtype, seed, kept=1.0, **options):  # noqa: E741
    """(sides as the kernels take them, features, gradients of fp64 autograd, valid positions), images first."""
    image, text, token_mask, image_mask, grads = inputs(I, J, N, M, D, dtype, seed, **options)
    some = torch.rand((I, J), generator=torch.Generator().manual_seed(seed)) < kept
    grads = [g * some for g in grads]
    if seed % 2:  # as .sum() and a transpose leave them
        grads = [g.t().contiguous().t() for g in grads]
    full = torch.ones(I, N, dtype=torch.bool) if image_mask is None else image_mask
    wide = [x.double().requires_grad_() for x in (image, text)]
    *scores, arg_i2t, arg_t2i = reference(*wide, token_mask, full)
    torch.autograd.backward(scores, [g.double() for g in grads])
    images = one_side(image, image_mask, arg_i2t.to(index_dtype(M)).contiguous(), grads[0])
    texts = one_side(text, token_mask, arg_t2i.to(index_dtype(N)).contiguous(), grads[1])
    return (images, texts), (image, text), [x.grad for x in wide], (full, token_mask)


def dense(sides, features, axis, list_bytes=2**20):
    """The gradient of one side by the dense kernel, whatever the estimate says."""
    from ds_cmli.cmli.triton.gradient import KeptPairs, write_dense

    p, q, out = sides[axis], sides[1 - axis], torch.zeros_like(features[axis])
    write_dense(out, features[1 - axis], p, q, axis, KeptPairs.of(p, q, axis))
    return out


def sparse(sides, features, axis, list_bytes=2**20):
    """The gradient of one side by the sparse kernels, whatever the estimate says."""
    from ds_cmli.cmli.triton.gradient import KeptPairs, Lists, write_sparse

    p, q = sides[axis], sides[1 - axis]
    pairs = KeptPairs.of(p, q, axis)
    pairs.sparse.fill_(1)
    lists = Lists.of(features[axis].shape[:2], features[1 - axis].shape[:2], list_bytes)
    out = torch.zeros_like(features[axis])
    write_sparse(out, features[1 - axis], p, q, axis, lists, pairs)
    return out


def compare(*sizes, by=sparse, list_bytes=2**20, axes=(0, 1), **options):
    """Largest error of both sides relative to the largest entry; the same bits twice, 0 where nothing is valid."""
    sides, features, expected, valid = case(*sizes, **options)
    worst = 0.0
    for axis in axes:
        first, again = (by(sides, features, axis, list_bytes) for _ in range(2))
        assert torch.equal(first, again) and not first[~valid[axis]].any()
        worst = max(worst, distance(first, expected[axis]))
    assert worst < TOLERANCE[sizes[5]], (sizes, options, worst)
    return worst


def random_case(seed):
    """Sizes and options of one random case: odd sizes, strides, holes, empty texts, ties and left-out pairs."""
    rng = torch.Generator().manual_seed(seed)
    sizes = [int(torch.randint(1, most, (), generator=rng)) for most in (5, 6, 61, 45, 81)]
    dtype = (torch.float32, torch.float16, torch.float32, torch.float64)[seed % 4]
    kept = (1.0, 0.3, 0.1)[seed % 3]
    list_bytes = (2**20, 2000, 1)[seed % 5 % 3]
    options = {"kept": kept, "holes": seed % 3 > 0, "exact": seed % 7 == 0, "list_bytes": list_bytes}
    return (*sizes, dtype, seed), options


@check
def random_cases():
    for seed in range(1, 5):
        sizes, options = random_case(seed)
        compare(*sizes, **options)


@check
def long_sides():
    compare(1, 2, 300, 5, 33, torch.float32, 1)  # int16 indices
    compare(2, 2, 1030, 33, 4, torch.float32, 2, axes=(0,))  # more tiles than one matrix of the usual size takes
    compare(1, 2, 5, 270, 20, torch.float16, 2)  # positions sorted in several parts
    compare(1, 2, 9, 7, 300, torch.float16, 3)  # features in several programs
    compare(1, 300, 3, 1, 8, torch.float32, 4, kept=0.1, axes=(0,))  # pairs looked at in several parts


@check
def one_patch_that_wins_everything():
    image, text = torch.zeros(2, 40, 8), torch.rand(3, 18, 8) + 0.1
    image[:, 37] = 1
    sides = [
        one_side(image, None, torch.zeros(2, 3, 40, dtype=torch.uint8), torch.ones(2, 3)),
        one_side(text, None, torch.full((2, 3, 18), 37, dtype=torch.uint8), torch.ones(2, 3)),
    ]
    d_image = sparse(sides, (image, text), 0)
    torch.testing.assert_close(d_image[0, 0], text[:, 0].sum(0) / 40)
    torch.testing.assert_close(d_image[1, 37], text[:, 0].sum(0) / 40 + text.mean(1).sum(0))


@check
def the_choice():
    from ds_cmli.cmli.triton.gradient import COSTS, costs, sparse_pays, write_gradient

    for dtype in (torch.bfloat16, torch.float16):
        for N, M, pays in ((196, 64, True), (196, 40, True), (196, 16, False), (16, 16, False)):
            assert sparse_pays.fn(8 * 9, 8, 9, 8 * N, 9 * M, 9 * M, *COSTS[dtype]) is pays  # d_image
            assert sparse_pays.fn(9 * 8, 9, 8, 9 * M, 8 * N, 8 * N, *COSTS[dtype]) is pays  # d_text
        assert sparse_pays.fn(8 * 9 / 5, 8, 9, 8 * 196, 9 * 16, 9 * 16, *COSTS[dtype])  # of a fifth of the pairs
        # An H100's L2 is slow beside its products: dense wins where more than two thirds are kept.
        for kept, pays in ((0.8, False), (0.6, True)):
            of_h100 = costs(dtype, (9, 0))
            assert sparse_pays.fn(kept * 72, 8, 9, 8 * 208, 9 * 64, 9 * 62, *of_h100) is pays
            assert sparse_pays.fn(kept * 72, 9, 8, 9 * 64, 8 * 208, 8 * 196, *of_h100) is pays
    # Both ways give the gradient, and which one does is decided by the lengths and the pairs that are left.
    for M, kept in ((9, 1.0), (9, 0.1), (64, 1.0)):
        sides, features, expected, _ = case(2, 3, 70, M, 16, torch.float16, 5, kept=kept, holes=False)
        for axis in (0, 1):
            out = torch.zeros_like(features[axis])
            write_gradient(out, features[1 - axis], sides[axis], sides[1 - axis], axis, 2**20)
            assert distance(out, expected[axis]) < TOLERANCE[torch.float16]
            by_sparse = torch.equal(out, sparse(sides, features, axis))
            assert by_sparse is (M == 64 or kept < 1), (M, kept, axis)


def test_sides_that_are_too_long_take_no_lists():
    pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")
    from ds_cmli.cmli.triton.gradient import Lists

    assert Lists.of((4, 4096), (4, 64), 2**20)[1:] == (256, 16, 4)
    assert Lists.of((4, 4097), (4, 64), 2**20) is None
    assert Lists.of((4, 64), (2**21, 64), 2**20) is None


@pytest.fixture(scope="module")
def interpreted():
    """The traceback of each check that fails, from one process of Triton's interpreter."""
    return json.loads(in_interpreter(__file__).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(interpreted, name):
    assert interpreted[name] is None


if __name__ == "__main__":
    from tests.cmli.helpers import interpret_faster

    interpret_faster()
    print(json.dumps({name: failure(function) for name, function in CHECKS.items()}))
