"""The Triton backend against a few lines of fp64, run on the CPU by Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, so the checks run in a process of their own: this file.
bf16 is left out, because the interpreter multiplies it wrongly; it is compiled in test_triton_compile.py. Nothing here
shows what threads do to each other on a GPU. The interpreter takes seconds for a case: those of each check are a part
in which every value of every setting occurs.
"""

import json
import weakref
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_cmli.cmli import cmli_peak_bytes
from ds_cmli.cmli.inputs import Sides, Wanted
from tests.cmli.helpers import TOLERANCE, distance, failure, in_interpreter, inputs, reference

CHECKS = {}


def chosen(cases, few):
    """Those of `cases` at the places `few`."""
    return [case for number, case in enumerate(cases) if number in few]


def check(function):
    CHECKS[function.__name__] = function
    return function


def run(image, text, token_mask, image_mask, grads, scratch=2**25, recompute=False):
    from ds_cmli.cmli.triton import backward, forward

    sides = Sides(image, text, token_mask, image_mask)
    s_i2t, s_t2i, *args = forward(sides, scratch, not recompute)
    return s_i2t, s_t2i, *args, *backward(sides, grads, args, Wanted(True, True), scratch)


def compare(I, J, N, M, D, dtype, seed, **options):  # noqa: E741
    image, text, token_mask, image_mask, grads = inputs(I, J, N, M, D, dtype, seed, **options)
    s_i2t, s_t2i, _, _, d_image, d_text = run(image, text, token_mask, image_mask, grads)
    ours = (s_i2t, s_t2i, d_image, d_text)
    wide = [x.double().requires_grad_() for x in (image, text)]
    full = torch.ones(I, N, dtype=torch.bool) if image_mask is None else image_mask
    expected = reference(*wide, token_mask, full)[:2]
    torch.autograd.backward(expected, [g.double() for g in grads])
    scores = min(TOLERANCE[dtype], 1e-5)
    for name, x, y in zip(("s_i2t", "s_t2i"), ours, expected, strict=False):
        assert distance(x, y.detach()) < scores, (name, I, J, N, M, D, dtype, seed, distance(x, y.detach()))
    for name, x, y in zip(("d_image", "d_text"), ours[2:], wide, strict=True):
        assert x.dtype == dtype
        assert distance(x, y.grad) < TOLERANCE[dtype], (name, I, J, N, M, D, dtype, seed, distance(x, y.grad))
    assert not d_text[~token_mask].any() and not d_image[~full].any()


@check
def random_shapes(count=6):
    rng = torch.Generator().manual_seed(0)
    for seed in range(count):
        I, J, N, M, D = (int(torch.randint(1, top, (), generator=rng)) for top in (4, 5, 41, 41, 41))  # noqa: E741
        dtype = (torch.float32, torch.float16)[seed % 2]
        compare(I, J, N, M, D, dtype, seed, holes=seed % 3 > 0)


@check
def long_sides():
    cases = [
        ((1, 3, 300, 70, 33), 1, True),  # several blocks of patches; int16 indices
        ((1, 3, 17, 130, 20), 2, True),  # several tiles of a text
        ((1, 2, 5, 290, 8), 3, False),
        ((2, 3, 9, 20, 300), 4, True),  # features in several products
    ]
    dtypes = (torch.float32, torch.float16)
    for (sizes, seed, holes), dtype in chosen(product(cases, dtypes), few=(0, 3, 4, 7)):
        compare(*sizes, dtype, seed, holes=holes)
    compare(3, 4, 30, 40, 24, torch.float64, 5)
    compare(1, 70, 6, 5, 8, torch.float32, 6)  # several groups of texts


@check
def ties_go_to_the_lowest_index():
    for seed in chosen(range(12), few=(0, 1, 10, 11)):
        dtype = (torch.float32, torch.float16)[seed % 2]
        N = 300 if seed == 11 else 37
        image, text, token_mask, image_mask, grads = inputs(3, 4, N, 35, 2, dtype, seed, exact=True)
        s_i2t, s_t2i, arg_i2t, arg_t2i, _, _ = run(image, text, token_mask, image_mask, grads)
        expected = reference(image.double(), text.double(), token_mask, image_mask)
        some = image_mask.any(1)[:, None] & token_mask.any(1)[None, :]
        patch, token = some[..., None] & image_mask[:, None, :], some[..., None] & token_mask[None, :, :]
        assert arg_t2i.dtype == (torch.uint8 if N <= 256 else torch.int16)
        assert torch.equal(arg_i2t.long()[patch], expected[2].expand_as(arg_i2t)[patch])
        assert torch.equal(arg_t2i.long()[token], expected[3].expand_as(arg_t2i)[token])
        torch.testing.assert_close(s_i2t.double(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(s_t2i.double(), expected[1], rtol=1e-6, atol=0)


@check
def same_bits_again_and_alike_in_groups():
    for N, dtype, few in ((150, torch.float32, (1,)), (30, torch.float16, (0, 2))):
        case = inputs(2, 5, N, 18, 12, dtype, 7)
        first = run(*case)
        for x, y in zip(first, run(*case), strict=True):
            assert torch.equal(x, y)
        for scratch in chosen((2**25, 2000, 1), few):
            again = run(*case, scratch=scratch, recompute=True)
            for k in (0, 1, 4, 5):
                # Equal bits on a GPU; the interpreter's matrix product is numpy's, where a row's place matters.
                torch.testing.assert_close(first[k], again[k], rtol=1e-6 if dtype.itemsize > 2 else 1e-3, atol=1e-6)


@check
def only_what_is_asked_for():
    from ds_cmli.cmli.triton import backward, forward

    image, text, token_mask, image_mask, _ = inputs(2, 3, 9, 7, 5, torch.float32, 8)
    *_, arg_i2t, arg_t2i = forward(Sides(image, text, token_mask, image_mask), 2**20, False)
    assert arg_i2t.shape == arg_t2i.shape == (0,)
    one = torch.ones(()).expand(2, 3)  # as .sum().backward() gives it: no strides
    views = image.transpose(1, 2).contiguous().transpose(1, 2), text[:, :, :]
    everything = run(image, text, token_mask, image_mask, [torch.ones(2, 3)] * 2)[4:]
    for k in (0, 1):
        sides = Sides(*views, token_mask, image_mask)
        part = backward(sides, (one, one), (arg_i2t, arg_t2i), Wanted(k == 0, k == 1), 2**20)
        assert torch.equal(part[k], everything[k]) and part[1 - k].shape == (0,)


@check
def any_layout():
    from tests.cmli.helpers import RECOMPUTED, any_layout_gives_the_same

    any_layout_gives_the_same("triton", chosen(({}, RECOMPUTED), few=(0,)))


@check
def nan_and_inf_propagate():
    plain = inputs(3, 4, 20, 18, 6, torch.float32, 9, exact=True)
    lengths = (20, 200)  # one block and several
    for value, side, N in chosen(product((torch.nan, -torch.inf, 3e38), (0, 1), lengths), few=(0, 3, 6, 9)):
        image, text, token_mask, _, grads = inputs(3, 4, N, 18, 6, torch.float32, 9, exact=True)
        mask = torch.ones(3, N, dtype=torch.bool)
        (image, text)[side][2, 3, 1] = value
        token_mask[2, 3] = True
        *ours, arg_i2t, arg_t2i, _, _ = run(image, text, token_mask, mask, grads)
        expected = reference(image, text, token_mask, mask)[:2]
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-5, atol=1e-6)
            assert not x[:2, :2].isnan().any()
        assert arg_i2t.max() < 18 and arg_t2i.to(torch.int32).max() < N
    # What a masked position holds changes nothing, not even as NaN.
    image, text, token_mask, image_mask, grads = plain
    holed = image.clone(), text.clone()
    holed[0][~image_mask], holed[1][~token_mask] = torch.nan, torch.inf
    for x, y in zip(run(*plain), run(*holed, token_mask, image_mask, grads), strict=True):
        assert x.dtype in (torch.uint8, torch.int16) or torch.equal(x, y)


@check
def small_upstream_gradients_in_fp16():
    image, text, token_mask, image_mask, grads = inputs(3, 5, 40, 9, 16, torch.float16, 10)
    image, text = image * 64, text * 64
    plain = run(image, text, token_mask, image_mask, grads)[4:]
    tiny = run(image, text, token_mask, image_mask, [g * 2**-12 for g in grads])[4:]
    for x, y in zip(plain, tiny, strict=True):  # coefficients down to 2^-12 / 40, under fp16's normal numbers
        assert (x.double() - y.double() * 2**12).abs().max() < 1e-3 * x.double().abs().max()


class Allocated(TorchDispatchMode):
    """Peak bytes of the tensors that operators make, by their storages."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                key = x.untyped_storage().data_ptr()
                if key in self.live:
                    self.live[key][1] += 1
                elif key not in known:
                    self.live[key] = [x.untyped_storage().nbytes(), 1]
                else:
                    continue
                weakref.finalize(x, self.drop, key)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))
        return result

    def drop(self, key):
        self.live[key][1] -= 1
        if self.live[key][1] == 0:
            del self.live[key]


@check
def only_kept_pairs_are_computed_again():
    """With argmax indices that are computed again, backward gives the bits of saved ones, and lists no other tiles."""
    from ds_cmli.cmli.triton import backward, forward
    from ds_cmli.cmli.triton.tiles import Sequences, text_tiles, walk

    for N, dtype, scratch in ((20, torch.float16, 600), (140, torch.float32, 9000)):
        *four, grads = inputs(3, 9, N, 40, 32, dtype, 13)
        sides, generator = Sides(*four), torch.Generator().manual_seed(N)
        left_out = torch.rand(3, 9, generator=generator) < 0.6
        left_out[0], left_out[:, 3] = True, True
        grads = tuple(grad.masked_fill(left_out, 0.0) for grad in grads)
        *_, arg_i2t, arg_t2i = forward(sides, 2**25, True)
        none = arg_i2t.new_empty(0), arg_t2i.new_empty(0)
        saved = backward(sides, grads, (arg_i2t, arg_t2i), Wanted(True, True), scratch)
        again = backward(sides, grads, none, Wanted(True, True), scratch)
        assert all(torch.equal(x, y) for x, y in zip(saved, again, strict=True)), (N, dtype, scratch)
        assert all(x.isfinite().all() and (x != 0).any() for x in again)

        kept = (~left_out).to(torch.uint8)
        *_, of_kept_i2t, of_kept_t2i = forward(sides, scratch, True, kept)
        for entry, whole in ((of_kept_i2t, arg_i2t), (of_kept_t2i, arg_t2i)):
            assert torch.equal(entry[~left_out], whole[~left_out]) and not entry[left_out].any()

        texts = Sequences(sides.token_mask, 9, 40, torch.device("cpu"))
        for tiles in text_tiles(texts, (16, 32)):
            own = walk(tiles, 4, kept)
            listed = tiles.code[: int(tiles.first[-1])].tolist()
            for image in range(3):
                wanted = [tile for tile in listed if kept[image, tile // tiles.slots]]
                code, first = own.code[image], own.first[image].tolist()
                assert code[: first[-1]].tolist() == wanted and int(code[first[-1]]) == 9 * tiles.slots
                for group in range(3):
                    texts_of = {tile // tiles.slots for tile in wanted[first[group] : first[group + 1]]}
                    assert texts_of <= set(range(4 * group, 4 * group + 4))


@check
def peak_bytes_are_true():
    from ds_cmli.cmli.triton import backward, forward

    cases = (
        ((4, 12, 30, 20, 64), torch.float16, 2**25),
        ((4, 12, 30, 20, 64), torch.float16, 1000),
        ((3, 6, 150, 20, 64), torch.float32, 4000),
    )
    for (sizes, dtype, scratch), recompute in chosen(product(cases, (False, True)), few=(0, 3, 5)):
        *four, grads = inputs(*sizes, dtype, 11)
        sides = Sides(*four)
        with Allocated() as first:
            *_, arg_i2t, arg_t2i = forward(sides, scratch, not recompute)
        with Allocated() as second:
            backward(sides, grads, (arg_i2t, arg_t2i), Wanted(True, True), scratch)
        options = {"recompute": recompute, "scratch_bytes": scratch, "image_lengths": [sizes[2]] * sizes[0]}
        stated = cmli_peak_bytes(*sizes, dtype, backend="triton", **options)
        result = first.peak, second.peak
        assert result == (stated.forward, stated.backward), (sizes, scratch, recompute, result, stated)


def test_peak_bytes_of_the_document_s_setting():
    triton_backend_or_skip()
    setting = (256, 512, 196, 64, 256, torch.bfloat16)
    options = {"backend": "triton", "scratch_bytes": 2**25, "limits": ((9, 0), 227 * 1024)}
    peak = cmli_peak_bytes(*setting, **options)
    assert 256 * 512 * (196 + 64) < peak.forward < 40e6
    assert 2**24 * 0.9 < peak.backward - peak.gradients < 2**24 + 7e6  # lists of the sparse kernels
    peak = cmli_peak_bytes(*setting, **options, recompute=True)
    assert 2**25 * 0.9 < peak.backward - peak.gradients < 2**25 + 9e6


def triton_backend_or_skip():
    pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")
    from ds_cmli.cmli import triton as triton_backend

    return triton_backend


def test_cpu_tensors_are_refused_in_one_line():
    triton_backend = triton_backend_or_skip()
    image, text, token_mask, image_mask, _ = inputs(1, 2, 3, 4, 5, torch.float32, 0)
    with pytest.raises(RuntimeError, match="runs on CUDA tensors, not on cpu: use backend='chunked'"):
        triton_backend.forward(Sides(image, text, token_mask, image_mask), 2**20, True)


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
