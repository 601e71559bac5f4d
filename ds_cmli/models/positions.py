"""A table of learned positions at the patches of pictures of any aspect.

Shapes: B images, N patches of a square one, H width.
"""

import torch
from torch import Tensor

from ds_cmli.data.aspect import Grid


def at_patches(table: Tensor, square: Grid, grid: Tensor | None, antialias: bool = False) -> Tensor:
    """The positions at the centres of each picture's patches, interpolated linearly.

    A picture of the table's own grid gets its entries. Patches past a grid get some of them too.

    Args:
        table: [rows, columns, H].
        square: the patches of a square picture; N is their product.
        grid: int64 [B, 2]; None: all are square, and B is 1.
        antialias: whether smaller grids average over the entries between their patches.

    Returns:
        fp32 [B, N, H].
    """
    table = table.float()
    if grid is None:
        grid = torch.tensor([square], device=table.device)
    columns = grid[:, 1:]  # [B, 1]
    number = torch.arange(square[0] * square[1], device=table.device)
    place = number // columns, number % columns  # [B, N] each
    sides = []
    for at, count, entries in zip(place, grid.unbind(1), table.shape, strict=False):
        scale = entries / count[:, None]
        centre = ((at + 0.5) * scale - 0.5).clamp(0, entries - 1)
        distance = (centre[..., None] - torch.arange(entries, device=table.device)).abs()
        if not antialias:
            sides.append((1 - distance).clamp(min=0))  # [B, N, entries]
            continue
        near = (1 - distance / scale.clamp(min=1)[..., None]).clamp(min=0)
        sides.append(near / near.sum(-1, keepdim=True))
    weights = sides[0][..., :, None] * sides[1][..., None, :]  # [B, N, rows, columns]
    return weights.flatten(2) @ table.flatten(0, 1)
