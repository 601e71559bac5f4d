"""Pictures of any aspect: their grids, and how their patches lie in a square."""

import pytest
import torch

from ds_cmli.data.aspect import grid_of, laid_out, packed, patch_mask, unpacked
from ds_cmli.data.batch import stack_grids


@pytest.mark.parametrize(
    "size, grid",
    [
        ((224, 224), (14, 14)),
        ((640, 480), (12, 16)),
        ((480, 640), (16, 12)),
        ((1000, 100), (4, 40)),
        ((10_000, 1), (1, 196)),
        ((1, 10_000), (196, 1)),
    ],
)
def test_grids(size, grid):
    assert grid_of(*size, 14) == grid


def test_every_grid_is_nearly_full_little_distorted_and_its_own():
    for width in range(20, 81):
        rows, columns = grid_of(width, 40, 14)
        assert 0.85 * 196 <= rows * columns <= 196
        assert abs(columns / rows / (width / 40) - 1) < 0.12
        for side in (3, 7, 14):
            rows, columns = grid_of(width, 40, side)
            assert grid_of(16 * columns, 16 * rows, side) == (rows, columns)


def test_patches_lie_row_by_row_in_the_cells():
    image = torch.arange(8, dtype=torch.uint8).repeat(3, 1, 1)  # one row of 8 patches of one pixel
    square, grid = laid_out(image, 1, 3)
    assert grid == (1, 8)
    assert square[0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]
    assert torch.equal(unpacked(square, grid, 3), image)


@pytest.mark.parametrize("grid", [(1, 9), (2, 4), (3, 3), (7, 1)])
def test_what_is_packed_comes_back(grid):
    image = torch.randint(256, (3, 5 * grid[0], 5 * grid[1]), dtype=torch.uint8)
    square = packed(image, grid, 3)
    assert square.shape == (3, 15, 15) and square.is_contiguous()
    assert torch.equal(unpacked(square, grid, 3), image)
    if grid == (3, 3):
        assert torch.equal(square, image)
    # The last patch, and what is left.
    h, w = grid
    row, column = divmod(h * w - 1, 3)
    last = square[:, 5 * row : 5 * row + 5, 5 * column : 5 * column + 5]
    assert torch.equal(last, image[:, -5:, -5:])
    assert square.long().sum() == image.long().sum()


def test_square_ones_have_no_grid_and_black_ones_a_patch():
    assert laid_out(torch.ones(3, 6, 6), 0, 6)[1] is None
    assert stack_grids([None, None]) is None and patch_mask(None, 9) is None
    grids = stack_grids([(2, 4), None])
    assert grids.tolist() == [[2, 4], [1, 1]]
    assert patch_mask(grids, 9).tolist() == [[True] * 8 + [False], [True] + [False] * 8]
