"""The contrastive loss and its temperature against literals that can be checked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ds_cmli.cmli.contrastive import contrastive_loss, temperature_scale, unit_rows

F64 = torch.float64


def test_contrastive_loss_by_hand():
    s = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    scale = torch.tensor([math.log(2.0)])
    # Every row and column is (2, 0): -log(e^2 / (e^2 + 1)).
    assert contrastive_loss(s, s, scale).item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_contrastive_loss_takes_rows_from_one_matrix_and_columns_from_the_other():
    rows = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    columns = torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    row_loss = math.log(1 + math.exp(-3))
    column_loss = (math.log(1 + math.exp(1)) + math.log(1 + math.exp(5))) / 2
    outcome = contrastive_loss(rows, columns, torch.zeros(1)).item()
    assert outcome == pytest.approx((row_loss + column_loss) / 2)


def test_contrastive_loss_of_a_block_row():
    # Two ranks' blocks of one row each: the mean over ranks is the loss of the whole.
    s = torch.tensor([[0.3, -0.2], [0.8, 0.1]], dtype=F64)
    whole = contrastive_loss(s, s, torch.ones(1, dtype=F64))
    sums = {"column_logsumexp": lambda _: (math.e * s).logsumexp(0)}
    blocks = [contrastive_loss(s[r : r + 1], s[r : r + 1], torch.ones(1, dtype=F64), r, **sums) for r in range(2)]
    assert_close(sum(blocks) / 2, whole)


def test_contrastive_loss_of_tiles_that_do_not_meet_on_the_diagonal():
    torch.manual_seed(0)
    rows, columns = torch.rand(2, 6, 7, dtype=F64)
    one = torch.ones(1, dtype=F64)
    ignore = torch.zeros(6, 7, dtype=torch.bool)
    ignore[2, 5] = ignore[5, 0] = True
    whole = contrastive_loss(rows, columns, one, 1, ignore=ignore)  # row r's text is column r + 1
    total = 0.0
    for i in range(0, 6, 4):
        for j in range(0, 7, 3):
            tile = slice(i, i + 4), slice(j, j + 3)
            sums = {
                "row_logsumexp": lambda _, part=tile[0]: (
                    (math.e * rows).masked_fill(ignore, -math.inf).logsumexp(1)[part]
                ),
                "column_logsumexp": lambda _, part=tile[1]: (
                    (math.e * columns).masked_fill(ignore, -math.inf).logsumexp(0)[part]
                ),
            }
            outcome = contrastive_loss(rows[tile], columns[tile], one, i + 1 - j, ignore=ignore[tile], **sums)
            total += outcome * len(rows[tile]) / 6
    assert_close(total, whole)


def test_temperature_is_clamped_straight_through():
    x = torch.tensor([math.log(500.0)], requires_grad=True)
    y = temperature_scale(x)
    y.sum().backward()
    assert y.item() == pytest.approx(100.0, rel=1e-5)
    assert x.grad.item() == pytest.approx(100.0, rel=1e-5)  # not 0: a parameter over the limit can come back
    assert temperature_scale(torch.tensor([math.log(14.0)])).item() == pytest.approx(14.0, rel=1e-5)


def test_temperature_is_computed_in_fp32():
    assert temperature_scale(torch.tensor([2.5], dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
def test_unit_rows_have_the_bits_of_normalize_but_for_rows_without_a_direction(dtype):
    torch.manual_seed(0)
    x = (torch.randn(50, 7, 33) * 10.0 ** torch.randint(-4, 5, (50, 7, 1))).to(dtype)
    x[3, 2], x[4, :, 5] = 0.0, 0.0
    weight = torch.randn(50, 7, 33, dtype=F64)
    outputs, gradients = [], []
    for normalize in (unit_rows, lambda x: F.normalize(x if dtype is F64 else x.float(), dim=-1)):
        given = x.clone().requires_grad_()
        outputs.append(normalize(given))
        (outputs[-1] * weight.to(outputs[-1].dtype)).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*outputs)
    assert (
        gradients[0][3, 2].eq(0).all() and not gradients[1][3, 2].isfinite().logical_and(gradients[1][3, 2] < 1).all()
    )
    gradients[1][3, 2] = 0.0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-13])
def test_a_row_without_a_direction_learns_nothing(length):
    x = torch.full((2, 4), length).requires_grad_()
    unit_rows(x).sum().backward()
    assert x.grad.eq(0).all()
