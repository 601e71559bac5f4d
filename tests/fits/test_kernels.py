"""Which operands cuBLAS does not take as they lie; sizes by hand."""

import torch

from ds_cmli.fits.kernels import operand_copies

mm, addmm, bmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default


def test_only_operands_without_rows_or_columns_in_order_are_copied():
    by_rows, expanded = torch.zeros(4, 8), torch.zeros(()).expand(8, 6)
    assert operand_copies(mm, (by_rows, torch.zeros(6, 8).t())).after == ((),)
    assert operand_copies(mm, (by_rows, expanded)).after == ((8 * 6 * 4,),)
    assert operand_copies(addmm, (torch.zeros(6), by_rows[:, ::2], expanded[:4])).after == ((4 * 4 * 4, 4 * 6 * 4),)
    assert operand_copies(bmm, (torch.zeros(8, 5, 3).transpose(0, 1).half(), torch.zeros(5, 3, 2))).after == ((),)
    assert operand_copies(torch.ops.aten.mul.Tensor, (expanded, expanded)).after == ()
