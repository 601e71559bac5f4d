"""The op and its loss by their public functions, against equations (1) to (4) written out in loops."""

import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from ds_cmli.cmli import CMLILoss, cmli_scores
from ds_cmli.cmli.reference import cmli_scores_reference
from tests import ranks

Case = tuple[Tensor, Tensor, Tensor, Tensor]
IMPLEMENTATIONS = {"reference": cmli_scores_reference, "chosen": cmli_scores}
PADDING = 50.0  # what stands at positions that do not count


def random_case(dtype=torch.float64, I=3, J=5, N=37, M=9, D=16, seed=0) -> Case:  # noqa: E741
    """Features and masks with holes; the last image and the last text have no valid position, the first text one."""
    g = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(*shape, D, generator=g).to(dtype) for shape in ((I, N), (J, M)))
    patch_mask, token_mask = torch.rand(I, N, generator=g) < 0.7, torch.rand(J, M, generator=g) < 0.6
    patch_mask[-1], token_mask[-1], token_mask[0] = False, False, torch.arange(M) == 2
    image[~patch_mask], text[~token_mask] = PADDING, PADDING
    return image, text, token_mask, patch_mask


def by_loops(image: Tensor, text: Tensor, token_mask: Tensor, patch_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(1) to (4) in fp64, a pair at a time."""
    rows = []
    for v, of_patch in zip(image.double(), patch_mask, strict=True):
        for w, of_token in zip(text.double(), token_mask, strict=True):
            S = v[of_patch] @ w[of_token].t()
            both = (S.amax(1).mean(), S.amax(0).mean()) if S.numel() else (S.sum(), S.sum())
            rows.append(torch.stack(both))
    s = torch.stack(rows).view(len(image), len(text), 2)
    return s[..., 0], s[..., 1]


def with_gradients(function, case: Case, seed: int = 1) -> list[Tensor]:
    """s_i2t, s_t2i, and the gradients of images and texts for random ones of the scores."""
    image, text = (x.clone().requires_grad_() for x in case[:2])
    scores = function(image, text, *case[2:])
    g = torch.Generator().manual_seed(seed)
    of_scores = [torch.randn(s.shape, generator=g, dtype=torch.float64).to(s.dtype) for s in scores]
    return [*scores, *torch.autograd.grad(scores, (image, text), of_scores)]


@pytest.fixture(params=IMPLEMENTATIONS)
def scores(request):
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("sizes", [{}, {"N": 3, "M": 2, "D": 4}, {"N": 70, "M": 33, "D": 5}], ids=str)
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_scores_and_gradients_are_those_of_the_equations(scores, dtype, limit, sizes):
    case = random_case(dtype, **sizes)
    ours = with_gradients(scores, case)
    expected = with_gradients(by_loops, (case[0].double(), case[1].double(), *case[2:]))
    assert [x.dtype for x in ours] == [dtype] * 4
    assert_close([x.double() for x in ours], expected, rtol=limit, atol=limit)
    # What does not count gets exactly no gradient, and no text and no image without a position any score.
    assert not ours[2][~case[3]].any() and not ours[3][~case[2]].any()
    assert not any(s[-1].any() or s[:, -1].any() for s in ours[:2])


def test_padding_does_not_beat_negative_similarities(scores):
    image, text = torch.ones(2, 5, 4), -torch.ones(3, 6, 4)
    token_mask, patch_mask = torch.arange(6) < torch.tensor([[1], [4], [6]]), torch.arange(5) < torch.tensor([[2], [5]])
    assert [s.unique().item() for s in scores(image, text, token_mask, patch_mask)] == [-4.0, -4.0]


@pytest.mark.parametrize("N, M", [(1, 1), (3, 3), (40, 3), (40, 7), (2, 40)])
def test_a_tie_goes_to_the_lowest_valid_index(scores, N, M):
    """All similarities are equal, so each maximum's gradient goes to the first valid position."""
    image, text = torch.ones(2, N, 4, requires_grad=True), torch.ones(3, M, 4, requires_grad=True)
    token_mask, patch_mask = torch.ones(3, M, dtype=torch.bool), torch.ones(2, N, dtype=torch.bool)
    token_mask[1, 0], patch_mask[1, 0] = M == 1, N == 1  # where there are more, the first of some does not count
    s_i2t, s_t2i = scores(image, text, token_mask, patch_mask)
    d_image, d_text = torch.autograd.grad(s_t2i.sum(), (image, text), retain_graph=True)
    assert (d_image[..., 0].argmax(1) == patch_mask.int().argmax(1)).all()
    assert d_image[..., 0].count_nonzero(1).tolist() == [1, 1] and (d_text[token_mask] != 0).all()
    d_image, d_text = torch.autograd.grad(s_i2t.sum(), (image, text))
    assert (d_text[..., 0].argmax(1) == token_mask.int().argmax(1)).all()
    assert d_text[..., 0].count_nonzero(1).tolist() == [1, 1, 1] and (d_image[patch_mask] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_products_are_summed_in_fp32(scores, dtype):
    case = random_case(dtype, N=20, D=64)
    ours = scores(*case)
    assert [s.dtype for s in ours] == [torch.float32] * 2
    assert_close([s.double() for s in ours], list(by_loops(*case)), rtol=1e-5, atol=1e-5)
    # Two patches that rounded sums would not tell apart: the second is better by 1 of 257.
    image = torch.ones(1, 2, 257, dtype=dtype)
    image[0, 0, 0] = 0
    text = torch.ones(1, 1, 257, dtype=dtype)
    one = torch.ones(1, 1, dtype=torch.bool)
    assert scores(image, text, one, one.expand(1, 2))[1].item() == 257.0


def test_nan_stays_with_its_pair_and_behind_a_mask(scores):
    image, text, token_mask, patch_mask = random_case(torch.float32, J=4, N=40)
    expected = scores(image, text, token_mask, patch_mask)
    image[~patch_mask], text[~token_mask] = torch.nan, torch.inf
    assert_close(scores(image, text, token_mask, patch_mask), expected)
    image[0, patch_mask[0].nonzero()[-1, 0]] = torch.nan
    for s, before in zip(scores(image, text, token_mask, patch_mask), expected, strict=True):
        assert s[0, :-1].isnan().all() and torch.equal(s[1:], before[1:]) and s[0, -1] == 0


def test_the_same_bits_each_time():
    case = random_case(torch.float32, I=8, J=8, N=50, M=20)
    assert all(map(torch.equal, *(with_gradients(cmli_scores, case) for _ in range(2))))


# The loss.


def temperature(loss: CMLILoss) -> torch.nn.Parameter:
    ((_, parameter),) = loss.named_parameters()
    return parameter


def loss_by_loops(image: Tensor, text: Tensor, token_mask: Tensor, patch_mask: Tensor, logit_scale: Tensor) -> Tensor:
    unit = (F.normalize(x.double(), dim=-1) for x in (image, text))
    s_i2t, s_t2i = by_loops(*unit, token_mask, patch_mask)
    t, own = logit_scale.double().exp(), torch.arange(len(image))
    return (F.cross_entropy(t * s_i2t, own) + F.cross_entropy(t * s_t2i.t(), own)) / 2


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=str)
def test_loss_and_gradients_are_those_of_the_equations(dtype, limit):
    case = random_case(dtype, I=6, J=6)
    case[3][-1, 0] = case[2][-1, 0] = True
    loss = CMLILoss().to(dtype)
    of_loss, of_loops = temperature(loss), temperature(loss).detach().double().requires_grad_()
    functions = {loss: of_loss, partial(loss_by_loops, logit_scale=of_loops): of_loops}
    results = []
    for function, logit_scale in functions.items():
        inputs = [x.clone().requires_grad_() for x in case[:2]]
        value = function(*inputs, *case[2:])
        results.append([value, *torch.autograd.grad(value, [*inputs, logit_scale])])
    ours, expected = ([x.double() for x in result] for result in results)
    assert results[0][0].item() > 0 and math.isclose(temperature(loss).exp().item(), 50, rel_tol=1e-6)
    assert_close(ours, expected, rtol=limit, atol=limit * max(x.abs().max().item() for x in expected))


def test_one_over_the_temperature_is_at_most_100_and_learned_above_it_too():
    case, found = random_case(torch.float32, I=5, J=5), []
    for scale in (100.0, 1000.0):
        loss = CMLILoss()
        temperature(loss).data.fill_(math.log(scale))
        value = loss(*case)
        value.backward()
        found.append((value.item(), temperature(loss).grad.item()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3) and abs(found[1][1]) > 1e-3


def test_features_of_any_length_and_of_no_length():
    image, text, token_mask, patch_mask = random_case(torch.float64, I=5, J=5)
    loss = CMLILoss().double()
    expected = loss(image, text, token_mask, patch_mask)
    assert_close(loss(image * 7, text * 0.1, token_mask, patch_mask), expected)
    image[0, 0] = 0
    image.requires_grad_()
    loss(image, text, token_mask, patch_mask).backward()
    assert image.grad.isfinite().all()


def of_rank(rank: int, world: int, lengths: tuple[int, ...]) -> tuple:
    """A rank's loss and gradients of its part of a batch whose texts it has padded to its own longest."""
    image, text, token_mask, patch_mask, B = *global_batch(lengths), len(lengths) // world
    mine = slice(rank * B, rank * B + B)
    longest = max(lengths[mine])
    inputs = [image[mine].clone(), text[mine, :longest].clone()]
    loss = CMLILoss().double()
    value = loss(*(x.requires_grad_() for x in inputs), token_mask[mine, :longest], patch_mask[mine])
    value.backward()
    return value.item(), *(x.grad.numpy() for x in inputs), temperature(loss).grad.item()


def global_batch(lengths: tuple[int, ...]) -> Case:
    G, M = len(lengths), max(lengths)
    image, text, _, patch_mask = random_case(I=G + 1, J=G + 1, M=M, N=11)
    return image[:G], text[:G], torch.arange(M) < torch.tensor(lengths)[:, None], patch_mask[:G]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_uneven_texts_equal_one(world):
    """Averages over ranks are the loss and the gradients of the global batch: there is no factor of their number."""
    lengths = (3, 5, 0, 9, 12, 4)
    one = of_rank(0, 1, lengths)
    every = ranks.run(of_rank, world, lengths)
    assert sum(of[0] for of in every) / world == pytest.approx(one[0], rel=1e-9)
    assert sum(of[3] for of in every) / world == pytest.approx(one[3], rel=1e-9)
    B = len(lengths) // world
    for rank, (_, d_image, d_text, _) in enumerate(every):
        mine = slice(rank * B, rank * B + B)
        assert_close(torch.tensor(d_image) / world, torch.tensor(one[1][mine]), rtol=1e-9, atol=1e-12)
        expected = torch.tensor(one[2][mine, : d_text.shape[1]])
        assert_close(torch.tensor(d_text) / world, expected, rtol=1e-9, atol=1e-12)


# Triton's kernels, by its interpreter, for which a variable must be set before it is imported: this file in a process.


def interpreted() -> dict[str, float]:
    """The largest errors of scores and gradients; and of ties."""
    errors = {}
    for name, sizes in {"short": {"N": 5}, "several tiles": {"N": 70, "M": 33}}.items():
        case = random_case(torch.float32, I=2, J=3, **sizes)
        ours = with_gradients(by_triton, case)
        expected = with_gradients(by_loops, (case[0].double(), case[1].double(), *case[2:]))
        for part, x, y in zip(("i2t", "t2i", "image", "text"), ours, expected, strict=True):
            errors[f"{name} {part}"] = ((x - y).abs().max() / y.abs().max()).item()
    for N, M in ((70, 3), (5, 33)):
        image, text = torch.ones(1, N, 4, requires_grad=True), torch.ones(2, M, 4, requires_grad=True)
        s = by_triton(image, text, torch.ones(2, M, dtype=torch.bool), torch.ones(1, N, dtype=torch.bool))
        d_image = torch.autograd.grad(s[1].sum(), image, retain_graph=True)[0][0, :, 0]
        d_text = torch.autograd.grad(s[0].sum(), text)[0][:, :, 0]
        lost = d_image[1:].abs().sum() + d_text[:, 1:].abs().sum()
        errors[f"tie of {N} and {M}"] = (lost + (d_image[0] - 2).abs()).item()
    return errors


def by_triton(*arguments):
    return cmli_scores(*arguments, backend="triton")


def test_triton_interpreted():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert all(error < 1e-5 for error in errors.values()), errors


if __name__ == "__main__":
    print(json.dumps(interpreted()))
