"""Pairs left out of the gradient: which, with which error, and the bound on it.

B pairs a rank, N patches, M text positions, D embedding dimension.
"""

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ds_cmli.cmli import CMLILoss, cmli_scores
from ds_cmli.cmli.contrastive import contrastive_loss
from ds_cmli.cmli.cut import Cut, as_loss
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.losses.functions import duplicates
from tests.conftest import spawn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class CutTile:
    """A batch of normalised features, and how it is cut."""

    image: Tensor  # [B, N, D]
    text: Tensor  # [B, M, D]
    token_mask: Tensor  # bool [B, M]
    image_mask: Tensor | None  # bool [B, N]
    ignore: Tensor | None  # bool [B, B]
    logit_scale: float
    delta: float


def random_tile(seed: int, pairs: int = 0, spread: float = 0.0) -> CutTile:
    """Features whose own pairs match best, of random sizes, dtype, masks, temperature and cut.

    Args:
        pairs: B; 0: a random number.
        spread: how far features lie from their pair's topic; 0: a random distance, and any dtype.
    """
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    N, M, D = draw.randint(1, 9), draw.randint(1, 9), draw.choice((4, 16, 40))
    B, dtype = pairs or draw.randint(2, 40), torch.float64 if spread else draw.choice(DTYPES)
    spread = spread or draw.uniform(0.1, 2.0)
    topic = torch.randn(B, 1, D, generator=g)
    image = l2_normalize(topic + spread * torch.randn(B, N, D, generator=g))
    text = l2_normalize(topic + spread * torch.randn(B, M, D, generator=g))
    token_mask = torch.arange(M) < torch.randint(0, M + 1, (B, 1), generator=g)
    image_mask = torch.rand(B, N, generator=g) < 0.7 if draw.random() < 0.3 else None
    ignore = torch.rand(B, B, generator=g) < 0.1 if draw.random() < 0.5 else None
    if ignore is not None:
        ignore.diagonal().fill_(False)
    scale, delta = draw.uniform(2.0, 4.7), 10 ** draw.uniform(-5, -0.5)
    return CutTile(image.to(dtype), text.to(dtype), token_mask, image_mask, ignore, scale, delta)


def certified(tile: CutTile) -> tuple[float, float]:
    """The error in fp64, the larger of the sums of norms over patches and over tokens; the bound.

    Pairs are chosen in the tile's dtype, as in training; for these the exact gradient is computed.
    """
    masks, scale = (tile.token_mask, tile.image_mask), torch.tensor([tile.logit_scale])
    cut = Cut(tile.delta)
    scores = [s.requires_grad_() for s in cmli_scores(tile.image, tile.text, *masks)]
    s_i2t, s_t2i, units = cut.apply(scores[0], scores[1], 0)
    loss = contrastive_loss(s_i2t, s_t2i, scale, ignore=tile.ignore)
    grads = torch.autograd.grad(loss + as_loss(units, scale, len(tile.image)), scores)
    left_out = (grads[0] == 0) & (grads[1] == 0)
    left_out.fill_diagonal_(False)

    features = [x.double().requires_grad_() for x in (tile.image, tile.text)]
    exact = cmli_scores_reference(features[0], features[1], *masks)
    loss = contrastive_loss(*exact, scale.double(), ignore=tile.ignore)
    of_scores = torch.autograd.grad(loss, exact, retain_graph=True)
    missing = [g.masked_fill(~left_out, 0.0) for g in of_scores]
    errors = torch.autograd.grad(exact, features, missing)
    assert cut.found is not None
    return max(e.norm(dim=2).sum().item() for e in errors), cut.found[1].item()


def alike(B):
    """Normalised features whose own pairs match best, with captions of any length."""
    tile = random_tile(0, pairs=B, spread=0.8)
    return tile.image.double(), tile.text.double(), tile.token_mask, None


def trained(batch, cut, ignore=None, temperature=0.02, dtype=torch.float64, **options):
    """The loss, the gradients of image, text and temperature, and what was found."""
    image, text = (x.to(dtype).requires_grad_() for x in batch[:2])
    module = CMLILoss(temperature, cut=cut, **options).double()
    value = module(image, text, *batch[2:], ignore=ignore)
    grads = torch.autograd.grad(value, (image, text, module.logit_scale))
    return value.detach(), *grads, module.cut and module.cut.found


def test_small_weights_of_rows_and_columns_by_hand():
    # A unit of 10. Rows may leave out 2, columns likewise; what is on the diagonal is never left out.
    rows = torch.tensor([[0.01, 1.0, 0.5, 8.0], [4.0, -1.0, 3.0, 3.0], [1.9, 4.0, -9.0, 4.0], [0.1, 0.1, 0.1, -0.3]])
    columns = torch.tensor([[-5.0, 0.1, 0.1, 0.1], [0.1, -5.0, 1.0, 0.1], [6.0, 0.1, -5.0, 0.1], [1.0, 0.1, 0.1, -5.0]])
    grads, cut = (rows.clone(), columns.clone()), Cut(0.2)
    cut.leave_out(grads, torch.tensor([10.0, 1.0]), 0)
    left_out = torch.zeros(4, 4, dtype=torch.bool)
    left_out[0, [1, 2]] = True  # 1 and 0.5 of row 0, not 8
    left_out[3, [0, 1, 2]] = True  # all others of row 3; in column 0 the 1.0 leaves no room for the 6.0 of row 2
    for grad, before in zip(grads, (rows, columns), strict=True):
        assert torch.equal(grad, before.masked_fill(left_out, 0.0))
    mass = (rows.abs() + columns.abs())[left_out].sum().item()
    assert_close(cut.found, torch.tensor([11 / 16, mass * (1 + 2**-7)]))


@pytest.mark.parametrize("delta", [1e-4, 1e-3, 0.05])
def test_loss_and_temperature_are_exact_and_the_error_is_within_the_bound(delta):
    batch = alike(64)
    value, d_image, d_text, d_scale, _ = trained(batch, 0.0)
    outcome = trained(batch, delta)
    assert torch.equal(outcome[0], value) and torch.equal(outcome[3], d_scale)
    kept, bound = outcome[4].tolist()
    assert 1 / 64 <= kept < 0.6
    exact = d_image, d_text
    errors = [(a - b).norm(dim=2).sum().item() for a, b in zip(outcome[1:], exact, strict=False)]
    assert 0 < max(errors) <= bound <= 50 * delta * (1 + 2**-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_indices_of_kept_pairs_found_again_give_the_same_bits(dtype):
    batch = alike(64)
    saved = trained(batch, 1e-3, dtype=dtype)
    again = trained(batch, 1e-3, dtype=dtype, recompute=True)
    assert 1 / 64 <= saved[4][0] < 0.6
    for one, other in zip(saved, again, strict=True):
        assert torch.equal(one, other)


def test_the_bound_holds_for_any_tile():
    """Few and many pairs, sharp and flat, 16-bit features, masks of images and pairs that are no negatives."""
    result = [certified(random_tile(seed)) for seed in range(100)]
    assert all(error <= bound for error, bound in result)
    assert max(error / bound for error, bound in result if bound) > 0.5 and sum(error > 0 for error, _ in result) > 50


def test_rows_and_columns_leave_out_no_more_than_allowed():
    torch.manual_seed(0)
    weights = torch.rand(2, 50, 70, dtype=torch.float64).pow_(12)
    grads = weights[0] / weights[0].sum(1, keepdim=True), weights[1] / weights[1].sum(0)
    after = [g.clone() for g in grads]
    Cut(0.01).leave_out((after[0], after[1]), torch.ones(2, dtype=torch.float64), 5)
    assert (grads[0] - after[0]).sum(1).max() <= 0.01 and (grads[1] - after[1]).sum(0).max() <= 0.01
    left_out = after[0] == 0
    assert torch.equal(left_out, after[1] == 0) and 0.3 < left_out.double().mean() < 1
    assert not left_out.diagonal(5).any()


def test_nothing_is_left_out_of_equal_weights():
    grads = torch.full((30, 30), 1 / 30), torch.full((30, 30), 1 / 30)
    cut = Cut(1e-3)
    cut.leave_out(grads, torch.ones(2), 0)
    assert cut.found.tolist() == [1.0, 0.0] and grads[0].all() and grads[1].all()


def test_gradients_that_are_not_finite_are_kept():
    grads = torch.full((4, 4), math.nan), torch.full((4, 4), math.inf)
    Cut(0.5).leave_out(grads, torch.full((2,), math.nan), 0)
    assert grads[0].isnan().all() and grads[1].isinf().all()


def on_rank(rank, world_size, exchange):
    """The share of 32 pairs, some of which are other captions of a picture."""
    (image, text, mask, _), ids = alike(32), torch.arange(32)[:, None].repeat(1, 2) // 3
    mine = slice(rank * 32 // world_size, (rank + 1) * 32 // world_size)
    ignore = duplicates(ids[mine], ids, mine.start)
    return trained((image[mine], text[mine], mask[mine], None), 1e-3, ignore, exchange=exchange)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_ranks_leave_out_what_one_does(exchange):
    whole, ranks = on_rank(0, 1, exchange), spawn(on_rank, 2, exchange)
    assert_close(torch.stack([r[0] for r in ranks]).mean(), whole[0])
    for k in (1, 2):
        assert_close(torch.cat([r[k] for r in ranks]) / 2, whole[k], rtol=1e-9, atol=1e-12)
    assert_close(sum(r[3] for r in ranks) / 2, whole[3])
    assert_close(sum(r[4] for r in ranks) / 2, whole[4])
    assert 1 / 32 < whole[4][0] < 0.9


@pytest.mark.parametrize("value", [-1e-3, 1.0, math.nan, math.inf, True, "0.1", None])
def test_what_is_no_mass_is_refused(value):
    with pytest.raises(ValueError, match=r"cut is .*: give a number from 0 to below 1"):
        CMLILoss(cut=value)


def test_compiled():
    module, batch = CMLILoss(cut=1e-3).double(), alike(32)
    image = batch[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.compile(module, backend="aot_eager")(image, *batch[1:]), image)
    expected = trained(batch, 1e-3)
    assert_close(grad, expected[1])
    assert torch.equal(module.cut.found, expected[4]) and expected[4][0] < 1
