"""Which operands cuBLAS does not take as they lie; sizes by hand."""

import torch

from ds_cmli.memory_model.cuda_layouts import operand_copies, transfer_copies
from ds_cmli.memory_model.cuda_operators import returned

aten = torch.ops.aten

mm, addmm, bmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default


def test_only_operands_without_rows_or_columns_in_order_are_copied():
    by_rows, expanded = torch.zeros(4, 8), torch.zeros(()).expand(8, 6)
    assert operand_copies(mm, (by_rows, torch.zeros(6, 8).t())).after == ((),)
    assert operand_copies(mm, (by_rows, expanded)).after == ((8 * 6 * 4,),)
    assert operand_copies(addmm, (torch.zeros(6), by_rows[:, ::2], expanded[:4])).after == ((4 * 4 * 4, 4 * 6 * 4),)
    assert operand_copies(bmm, (torch.zeros(8, 5, 3).transpose(0, 1).half(), torch.zeros(5, 3, 2))).after == ((),)


def test_copies_of_transfers_that_change_layout_or_type():
    """Of 96 numbers to the GPU. Types change on the host unless nobody waits for the copy."""
    x, last = torch.empty(2, 3, 4, 4), {"memory_format": torch.channels_last}

    def held(**given) -> int:
        return sum(map(sum, transfer_copies(aten._to_copy.default, (x,), {"device": "cuda", **given}).after))

    assert held() == held(dtype=torch.float16) == held(non_blocking=True) == 0
    assert held(**last) == 96 * 4 and held(dtype=torch.float16, **last) == 96 * 2
    assert held(dtype=torch.float16, non_blocking=True) == 96 * 4
    assert transfer_copies(aten._to_copy.default, (x,), {"device": "cpu", **last}).after == ()


def test_convolutions_keep_channels_last():
    x, weight = torch.empty(2, 8, 4, 4), torch.empty(8, 8, 3, 3)
    rest = [None, [1, 1], [1, 1], [1, 1], False, [0, 0]]
    for layout in (torch.contiguous_format, torch.channels_last):
        args = x, weight.to(memory_format=layout), *rest, 1
        assert returned(aten.convolution.default, args, x.clone()).is_contiguous(memory_format=layout)
    apart = x, torch.empty(8, 1, 3, 3).to(memory_format=torch.channels_last), *rest, 8  # a kernel of PyTorch's own
    assert returned(aten.convolution.default, apart, x.clone()).is_contiguous()
