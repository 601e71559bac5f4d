"""Finds the best images of each text, or texts of each image, without holding the matrix of all
scores.

Shapes: I images, J texts, k results.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 1 << 22  # number of scores in memory at a time: 16 MB in fp32


def topk(
    score: Callable[[slice, slice], Tensor], rows: int, columns: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k best columns of each row.

    Args:
        score: computes a block of scores, [rows of the first slice, columns of the second slice].
        k: the number of results of each row, at most `columns`.

    Returns:
        Values and int64 column numbers, [rows, k] each, the best first. Of equal scores the lower
        number comes first.
    """
    k = min(k, columns)
    width = min(columns, max(k, 1 << 12))
    height = max(1, BLOCK // width)
    values, numbers = [], []
    for top in range(0, rows, height):
        down = slice(top, min(rows, top + height))
        best = torch.empty(down.stop - down.start, 0)
        where = torch.empty(best.shape, dtype=torch.int64)
        for left in range(0, columns, width):
            across = slice(left, min(columns, left + width))
            block = score(down, across)
            place = torch.arange(across.start, across.stop).expand(block.shape)
            best, where = torch.cat([best, block], 1), torch.cat([where, place], 1)
            # A stable sort keeps the lower number first among equal scores.
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, where = best[:, :k], where.gather(1, order[:, :k])
        values.append(best)
        numbers.append(where)
    return torch.cat(values), torch.cat(numbers)
