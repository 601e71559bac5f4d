"""The loss in closed form, on any ranks, blocks and scratch, against its definition over all scores."""

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ds_cmli.cmli import CMLILoss, PairLoss, pair_function
from ds_cmli.cmli.normalize import l2_normalize
from ds_cmli.cmli.reference import cmli_scores_reference, pair_loss_reference
from tests import ranks

G, N, M, D = 12, 20, 6, 16
SETTINGS = list(product((False, True), (False, True)))  # vectors, sigmoid


def batch(vectors: bool, extra: bool, dtype=torch.float64):
    """Features and masks; `extra`: also zeros, patch masks, pairs that share an id, four empty texts at the end."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((G, D), (G, D)) if vectors else ((G, N, D), (G, M, D))
    image, text = (torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes)
    token_mask = patch_mask = ids = None
    if not vectors:
        token_mask = torch.arange(M) < torch.randint(0, M + 1, (G, 1), generator=rng)
        token_mask &= torch.rand(G, M, generator=rng) < 0.9  # holes
    if extra:
        image[..., 0, :] = 0
        ids = torch.randint(0, G, (G, 2), generator=rng)
    if extra and token_mask is not None:
        token_mask[-4:] = False  # all texts of the last of three ranks
        patch_mask = torch.rand(G, N, generator=rng) < 0.8
    return image, text, token_mask, patch_mask, ids


def duplicates_of(ids: Tensor) -> Tensor:
    """bool [G, G]: other pairs that share an id."""
    return (ids[:, None] == ids).any(2) & ~torch.eye(len(ids), dtype=torch.bool)


def test_one_over_the_temperature_is_at_most_100_and_learned_above_it_too():
    *sides, _ = batch(False, True, torch.float32)

    def value_and_gradient(scale: float) -> tuple[float, float]:
        loss = CMLILoss()
        loss.temperature.logit_scale.data.fill_(math.log(scale))
        value = loss(*sides)
        value.backward()
        return value.item(), loss.temperature.logit_scale.grad.item()

    value, gradient = value_and_gradient(100.0)
    value_above, gradient_above = value_and_gradient(1000.0)
    assert value_above == pytest.approx(value, rel=1e-5)
    assert gradient_above == pytest.approx(gradient, rel=1e-3)
    assert abs(gradient) > 1e-3


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays one, without a gradient."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, torch.inf)


def expected_results(vectors: bool, extra: bool, dtype, learned: Tensor) -> list[Tensor]:
    """Return the loss of the whole batch, and gradients of image, text and learned parameters, in fp64."""
    image, text, token_mask, patch_mask, ids = batch(vectors, extra, dtype)
    image, text = (x.double().requires_grad_() for x in (image, text))
    parameters = learned.double().requires_grad_()
    if vectors:
        scores = [unit(image) @ unit(text).t()] * 2
    else:
        scores = cmli_scores_reference(unit(image), unit(text), token_mask, patch_mask)
    values = torch.cat([parameters[:1].exp(), parameters[1:]])
    value = pair_loss_reference(*scores, values, None if ids is None else duplicates_of(ids))
    return [value.detach(), *torch.autograd.grad(value, (image, text, parameters))]


def results_of_rank(rank: int, world: int, vectors: bool, extra: bool, sigmoid: bool, dtype: torch.dtype) -> list:
    """Return the loss and gradients of a rank's part of the batch, for each scratch and size of blocks."""
    rank_pairs = slice(rank * G // world, (rank + 1) * G // world)
    results = []
    # With 2**11 bytes of scratch some images keep their scores.
    for scratch_bytes, block_bytes in ((1, 1), (1, 2**24), (2**11, 1), (2**26, 2**24)):
        pair_function.CPU_BLOCK_BYTES = block_bytes
        loss = PairLoss(0.03, -2.0 if sigmoid else None, scratch_bytes=scratch_bytes).to(dtype)
        image, text, token_mask, patch_mask, ids = (
            None if x is None else x[rank_pairs].clone() for x in batch(vectors, extra, dtype)
        )
        if token_mask is not None:  # each rank pads its texts to its own longest
            ends = (token_mask * torch.arange(1, M + 1)).amax()
            longest = max(1, int(ends))
            text = text[:, :longest].clone()
            token_mask = token_mask[:, :longest]
        value = loss(image.requires_grad_(), text.requires_grad_(), token_mask, patch_mask, ids)
        value.backward()
        d_learned = torch.cat([p.grad for p in loss.parameters()])
        results.append([x.detach().double().numpy() for x in (value, image.grad, text.grad, d_learned)])
    return results


@pytest.mark.parametrize("vectors, sigmoid", SETTINGS)
@pytest.mark.parametrize(
    "world", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_any_ranks_blocks_and_scratch_give_the_loss_of_the_whole_batch(world, vectors, sigmoid):
    learned = torch.cat([p.detach() for p in PairLoss(0.03, -2.0 if sigmoid else None).parameters()])
    for extra, (dtype, limit) in product((False, True), ((torch.float32, 1e-5), (torch.float64, 1e-9))):
        value, d_image, d_text, d_learned = expected_results(vectors, extra, dtype, learned)
        arguments = vectors, extra, sigmoid, dtype
        results = [results_of_rank(0, 1, *arguments)] if world == 1 else ranks.run(results_of_rank, world, *arguments)
        for setting in zip(*results, strict=True):
            # The mean over ranks is that of the whole batch.
            scaled = ([torch.as_tensor(x) / world for x in rank_results] for rank_results in setting)
            values, d_images, d_texts, d_learneds = zip(*scaled, strict=True)
            assert_close(sum(values), value, rtol=limit, atol=0)
            assert_close(sum(d_learneds), d_learned, rtol=limit, atol=limit)
            if not vectors:  # positions that a rank did not pad to have no gradient
                d_texts = [F.pad(x, (0, 0, 0, M - x.shape[1])) for x in d_texts]
            assert (torch.cat(d_images) - d_image).norm() < limit * d_image.norm()
            assert (torch.cat(list(d_texts)) - d_text).norm() < limit * d_text.norm()


def loss_and_gradients(loss, image, text, token_mask, call=lambda loss, *sides: loss(*sides)):
    image, text = (x.clone().requires_grad_() for x in (image, text))
    value = call(loss, image, text, token_mask)
    return [value.detach(), *torch.autograd.grad(value, (image, text, *loss.parameters()))]


def test_two_runs_have_the_same_bits_also_checkpointed():
    image, text, token_mask, *_ = batch(False, False, torch.float32)
    loss = CMLILoss()
    first = loss_and_gradients(loss, image, text, token_mask)
    again = loss_and_gradients(copy.deepcopy(loss), image, text, token_mask)
    assert_close(again, first, rtol=0, atol=0)
    checkpointed = loss_and_gradients(loss, image, text, token_mask, partial(checkpoint, use_reentrant=False))
    assert_close(checkpointed, first, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_those_of_the_rounded_unit_rows(dtype):
    image, text, token_mask, *_ = batch(False, False, dtype)
    value, d_image, d_text, _ = loss_and_gradients(CMLILoss(), image, text, token_mask)
    units = [l2_normalize(x).double().requires_grad_() for x in (image, text)]
    expected = pair_loss_reference(*cmli_scores_reference(*units, token_mask), torch.tensor([50.0]))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert d_image.dtype == dtype
    d_units = torch.autograd.grad(expected, units)
    for x, unit, d_unit, d_x in zip((image, text), units, d_units, (d_image, d_text), strict=True):
        length = x.double().norm(dim=-1, keepdim=True)
        expected_d_x = (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True)) / length
        assert (d_x.double() - expected_d_x).norm() < 1e-2 * expected_d_x.norm()


def test_pairs_that_share_an_id_are_counted():
    image, text, token_mask, _, ids = batch(False, True)
    loss = CMLILoss().double()
    loss(image, text, token_mask, ids=ids)
    assert loss.num_duplicates == duplicates_of(ids).sum() > 0
    loss(image, text, token_mask)
    assert loss.num_duplicates == 0


def test_under_autocast_vectors_of_two_dtypes_take_the_wider_one():
    image, text, *_ = batch(True, False, torch.float32)
    loss = PairLoss()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(image.bfloat16(), text)
    assert_close(value, loss(image.bfloat16().float(), text))


IMAGE, TEXT, MASK, *_ = batch(False, False, torch.float32)
VECTORS = torch.randn(G, D)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"text": TEXT[:3], "token_mask": MASK[:3]}, "a row for each pair, not .12, 3, None"),
        ({"ids": torch.zeros(G, dtype=torch.int64)}, "a row for each pair"),
        ({"token_mask": None}, "or have a token_mask"),
        ({"image": VECTORS, "text": VECTORS, "token_mask": None, "patch_mask": MASK}, "without a token_mask"),
        ({"image": VECTORS.long(), "text": VECTORS.long(), "token_mask": None}, "must be floats of one dtype"),
        ({"image": VECTORS, "text": VECTORS.half(), "token_mask": None}, "must be floats of one dtype"),
        ({"image": VECTORS[:0], "text": VECTORS[:0], "token_mask": None}, "there are no pairs"),
        ({"image": IMAGE[:0], "text": TEXT[:0], "token_mask": MASK[:0]}, "there are no pairs"),
        ({"token_mask": MASK.float()}, "token_mask must be bool"),
    ],
)
def test_an_argument_that_does_not_fit_is_one_line(arguments, reason):
    arguments = {"image": IMAGE, "text": TEXT, "token_mask": MASK} | arguments
    with pytest.raises(ValueError, match=reason) as raised:
        CMLILoss()(**arguments)
    assert "\n" not in str(raised.value)


def test_an_option_that_does_not_fit_is_one_line():
    with pytest.raises(ValueError, match=r"the temperature at the start is 0\.001: give at least 0\.01"):
        CMLILoss(0.001)
    with pytest.raises(ValueError, match="backend='x' is unknown; it must be one of auto, cpu, triton, torch"):
        CMLILoss(backend="x")
