"""Pictures of any aspect: each has a patch grid of its own, of at most as many patches as a square.

A picture's patches, row by row, fill the cells of a square image, so that batches keep their shape.
This is NaFlex (Tschannen et al., 2025, arXiv 2502.14786) with one length of sequences.
Shapes: B pictures, S side of the square image and p of a patch in pixels, n = S / p, N = n * n, and
a grid of h * w <= N patches.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of patches


@lru_cache(maxsize=4096)
def grid_of(width: int, height: int, side: int) -> Grid:
    """The grid of at most side * side patches for a picture: large, and little distorted.

    A picture of the size of its grid gets that grid again.
    """
    most, aspect = side * side, height / width
    grids: set[Grid] = set()
    for rows in range(1, most + 1):
        for columns in (math.floor(rows / aspect), math.ceil(rows / aspect)):
            grids.add((rows, min(most // rows, max(1, columns))))

    def value(grid: Grid) -> tuple[float, float, Grid]:
        """A hundredth of distortion is as bad as two hundredths fewer patches."""
        distortion = abs(math.log(grid[0] / grid[1] / aspect))
        return round(math.log(grid[0] * grid[1]) - 2 * distortion, 9), -distortion, grid

    return max(grids, key=value)


@lru_cache(maxsize=4096)
def naflex_grid(width: int, height: int, side: int, patch: int) -> Grid:
    """The grid of at most side * side patches that SigLIP 2's own processor takes."""
    from transformers.models.siglip2 import image_processing_siglip2 as siglip2

    size = siglip2.get_image_size_for_max_num_patches(height, width, patch, side * side)
    return size[0] // patch, size[1] // patch


def laid_out(image: Tensor, patch: int, size: int) -> tuple[Tensor, Grid | None]:
    """A picture, [3, h * p, w * p], as a batch takes it: `packed`, and its grid.

    Without `patch` it is square, and stays as it is.
    """
    if not patch:
        return image, None
    grid = image.shape[1] // patch, image.shape[2] // patch
    return packed(image, grid, size // patch), grid


def packed(image: Tensor, grid: Grid, side: int) -> Tensor:
    """Lay the patches of a picture, uint8 [3, h * p, w * p], into the cells of [3, S, S].

    The other cells are black. A picture of n * n patches stays as it is.
    """
    (h, w), patch = grid, image.shape[1] // grid[0]
    cells = image.new_zeros(side * side, 3, patch, patch)
    cells[: h * w] = _cells(image, grid)
    return _joined(cells, (side, side))


def unpacked(image: Tensor, grid: Grid | None, side: int) -> Tensor:
    """What `packed` has laid out: [3, S, S] -> [3, h * p, w * p]; without a grid, it is square."""
    if grid is None:
        return image
    return _joined(_cells(image, (side, side))[: grid[0] * grid[1]], grid)


def _cells(image: Tensor, grid: Grid) -> Tensor:
    """[3, h * p, w * p] -> [h * w, 3, p, p]."""
    rows = image.unflatten(1, (grid[0], -1)).unflatten(3, (grid[1], -1))  # [3, h, p, w, p]
    return rows.permute(1, 3, 0, 2, 4).flatten(0, 1)


def _joined(cells: Tensor, grid: Grid) -> Tensor:
    """[h * w, 3, p, p] -> [3, h * p, w * p]."""
    return cells.unflatten(0, grid).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).contiguous()


def grid_at(row: int, grid: Tensor | None, square: Grid) -> Grid:
    """The grid of one of several pictures, int64 [B, 2]; None: all are square."""
    if grid is None:
        return square
    rows, columns = grid[row].tolist()
    return rows, columns


def patch_mask(grid: Tensor | None, patches: int) -> Tensor | None:
    """Which of N patches a picture has: int64 [B, 2] -> bool [B, N]; None: all, of square ones."""
    if grid is None:
        return None
    return torch.arange(patches, device=grid.device) < grid.prod(1, keepdim=True)
