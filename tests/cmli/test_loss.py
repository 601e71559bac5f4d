"""The loss against its equations; `PairLoss` in closed form, on any ranks, against its definition over all scores."""

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ds_cmli.cmli import CMLILoss, PairLoss, pair_function
from ds_cmli.cmli.normalize import l2_normalize
from ds_cmli.cmli.reference import cmli_scores_reference, pair_loss_reference
from tests import ranks

G, N, M, D = 12, 20, 6, 16


def temperature(loss: CMLILoss) -> torch.nn.Parameter:
    ((_, parameter),) = loss.named_parameters()
    return parameter


def batch(vectors: bool, extra: bool, dtype=torch.float64):
    """Features, masks with empty texts, and pairs that share an id."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((G, D), (G, D)) if vectors else ((G, N, D), (G, M, D))
    image, text = (torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes)
    mask = None if vectors else torch.arange(M) < torch.randint(0, M + 1, (G, 1), generator=rng)
    patch_mask = torch.rand(G, N, generator=rng) < 0.8 if extra and not vectors else None
    ids = torch.randint(0, G, (G, 2), generator=rng) if extra else None
    return image, text, mask, patch_mask, ids


def test_one_over_the_temperature_is_at_most_100_and_learned_above_it_too():
    (*case, _), found = batch(False, True, torch.float32), []
    for scale in (100.0, 1000.0):
        loss = CMLILoss()
        temperature(loss).data.fill_(math.log(scale))
        value = loss(*case)
        value.backward()
        found.append((value.item(), temperature(loss).grad.item()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3) and abs(found[1][1]) > 1e-3


def test_features_of_any_length_and_of_no_length():
    image, text, token_mask, patch_mask, _ = batch(False, True)
    loss = CMLILoss().double()
    expected = loss(image, text, token_mask, patch_mask)
    assert_close(loss(image * 7, text * 0.1, token_mask, patch_mask), expected)
    image[0, 0] = 0
    image.requires_grad_()
    loss(image, text, token_mask, patch_mask).backward()
    assert image.grad.isfinite().all()


def expected(vectors: bool, extra: bool, dtype, learned: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients of the whole batch in fp64."""
    image, text, mask, patch_mask, ids = batch(vectors, extra, dtype)
    image, text = (x.double().requires_grad_() for x in (image, text))
    parameters = learned.double().requires_grad_()
    units = l2_normalize(image), l2_normalize(text)
    scores = [units[0] @ units[1].t()] * 2 if vectors else cmli_scores_reference(*units, mask, patch_mask)
    alike = None if ids is None else (ids[:, None] == ids).any(2)
    values = torch.cat([parameters[:1].exp(), parameters[1:]])
    value = pair_loss_reference(*scores, values, alike)
    return [value.detach(), *torch.autograd.grad(value, (image, text, parameters))]


def of_rank(rank: int, world: int, vectors: bool, extra: bool, sigmoid: bool, double: bool) -> list:
    """The same of a rank's part, for each scratch and size of blocks."""
    dtype, B = torch.float64 if double else torch.float32, G // world
    mine, results = slice(rank * B, rank * B + B), []
    for scratch, block in ((1, 1), (1, 2**24), (2**11, 1), (2**26, 2**24)):  # 2**11: of some images all is kept
        pair_function.CPU_BLOCK_BYTES = block
        loss = PairLoss(0.03, -2.0 if sigmoid else None, scratch_bytes=scratch).to(dtype)
        image, text, mask, patch_mask, ids = (None if x is None else x[mine] for x in batch(vectors, extra, dtype))
        if mask is not None:  # each rank pads its own
            longest = max(1, int(mask.sum(1).max()))
            text, mask = text[:, :longest], mask[:, :longest]
        image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
        value = loss(image, text, mask, patch_mask, ids)
        value.backward()
        learned = torch.cat([p.grad for p in loss.parameters()])
        results.append([x.detach().double().numpy() for x in (value, image.grad, text.grad, learned)])
    return results


@pytest.mark.parametrize("vectors, sigmoid", list(product((False, True), (False, True))))
@pytest.mark.parametrize("world", [1, 3])
def test_any_ranks_blocks_and_scratch_give_the_loss_of_the_whole_batch(world, vectors, sigmoid):
    learned = torch.cat([p.detach() for p in PairLoss(0.03, -2.0 if sigmoid else None).parameters()])
    for extra, double in product((False, True), (False, True)):
        limit = 1e-9 if double else 1e-5
        value, *right = expected(vectors, extra, torch.float64 if double else torch.float32, learned)
        arguments = vectors, extra, sigmoid, double
        every = ranks.run(of_rank, world, *arguments) if world > 1 else [of_rank(0, 1, *arguments)]
        for setting in zip(*every, strict=True):
            of_ranks = [[torch.as_tensor(x) / world for x in one] for one in setting]
            assert_close(sum(one[0] for one in of_ranks), value, rtol=limit, atol=0)
            assert_close(sum(one[3] for one in of_ranks), right[2], rtol=limit, atol=limit)
            for k, g in enumerate(right[:2]):
                rows = [one[1 + k] for one in of_ranks]
                if g.ndim == 3:  # what a rank has not padded to has no gradient
                    rows = [F.pad(x, (0, 0, 0, g.shape[1] - x.shape[1])) for x in rows]
                assert (torch.cat(rows) - g).norm() < limit * g.norm()


def unequal(rank: int, world: int) -> str:
    image, text, mask, *_ = batch(False, False)
    try:
        CMLILoss().double()(image[rank:], text[rank:], mask[rank:])
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_unequal_batches_get_a_line_each():
    assert ranks.run(unequal, 2) == ["ranks have 11 to 12 pairs: drop the last unequal batch"] * 2


def trained(loss, image, text, mask, through=lambda f, *x: f(*x)):
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    value = through(loss, image, text, mask)
    return [value.detach(), *torch.autograd.grad(value, (image, text, *loss.parameters()))]


def test_two_runs_have_the_same_bits_also_checkpointed():
    image, text, mask, *_ = batch(False, False, torch.float32)
    loss = CMLILoss()
    first = trained(loss, image, text, mask)
    assert all(map(torch.equal, first, trained(copy.deepcopy(loss), image, text, mask)))
    assert all(map(torch.equal, first, trained(loss, image, text, mask, partial(checkpoint, use_reentrant=False))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_those_of_the_rounded_unit_rows(dtype):
    image, text, mask, *_ = batch(False, False, dtype)
    ours = trained(CMLILoss(), image, text, mask)
    units = [l2_normalize(x).double().requires_grad_() for x in (image, text)]
    value = pair_loss_reference(*cmli_scores_reference(*units, mask), torch.tensor([50.0], dtype=torch.float64))
    assert ours[0].item() == pytest.approx(value.item(), rel=1e-5) and ours[1].dtype == dtype
    grads = torch.autograd.grad(value, units)
    for x, unit, g, mine in zip((image, text), units, grads, ours[1:3], strict=True):
        length = x.double().norm(dim=-1, keepdim=True)
        right = (g - unit * (unit * g).sum(-1, keepdim=True)) / length
        assert (mine.double() - right).norm() < 1e-2 * right.norm()


def test_pairs_that_share_an_id_are_counted():
    image, text, mask, _, ids = batch(False, True)
    loss = CMLILoss().double()
    loss(image, text, mask, ids=ids)
    alike = (ids[:, None] == ids).any(2)
    assert loss.num_duplicates == alike.sum() - len(ids) > 0
    loss(image, text, mask)
    assert loss.num_duplicates == 0


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"text": torch.randn(3, M, D)}, "a row for each pair"),
        ({"ids": torch.zeros(G, dtype=torch.int64)}, "a row for each pair"),
        ({"token_mask": None}, "or have a token_mask"),
    ],
)
def test_what_does_not_fit_is_one_line(change, reason):
    image, text, token_mask, *_ = batch(False, False, torch.float32)
    arguments = {"image": image, "text": text, "token_mask": token_mask} | change
    if "text" in change:
        arguments["token_mask"] = token_mask[:3]
    with pytest.raises(ValueError, match=reason):
        CMLILoss()(**arguments)
    with pytest.raises(ValueError, match="temperature at the start"):
        CMLILoss(0.001)
