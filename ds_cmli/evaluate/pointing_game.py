"""Pointing-game accuracy: how often the patch that fits a phrase best lies on what it names.

It follows Zhang et al., "Top-down Neural Attention by Excitation Backprop" (2016): a hit is a
maximum inside the box. Shapes: N = rows * columns patches, M tokens of a caption, F phrases in it,
D embedding dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.losses.functions import match_patches

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def scene_hits(
    patches: Tensor, tokens: Tensor, token_picture: Tensor, cells: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Count the hits of one scene.

    Args:
        patches, tokens: [N, D], [M, D].
        token_picture: int64 [M], the picture that each token names, -1 for none.
        cells: int64 [2, 2], the picture in each quarter, -1 for none.
        grid: numbers of rows and columns of patches.

    Returns:
        fp64 [2]: the number of tokens whose best patch lies in their own picture, and of all tokens
        with a picture.
    """
    match = match_patches(tokens[None], patches[None])[0]  # [M]
    pictures = F.interpolate(cells[None, None].float(), size=grid, mode="nearest").long()
    found = pictures.flatten()[match]  # [M]
    counted = token_picture >= 0
    return torch.stack([((found == token_picture) & counted).sum(), counted.sum()]).double()


def phrase_hits(patches: Tensor, tokens: Tensor, phrase: Tensor, inside: Tensor) -> Tensor:
    """Whether the patch with the highest mean similarity to a phrase's tokens lies inside: [F].

    Args:
        patches, tokens: [N, D], [M, D], of unit length.
        phrase: int64 [M], the phrase of each token, -1 for none. A phrase without a token is no
            hit.
        inside: bool [F, N], the patches whose centre lies in a box of the phrase.
    """
    similarity = tokens.float() @ patches.float().t()  # [M, N]
    of_phrase = phrase == torch.arange(len(inside))[:, None]  # [F, M]
    mean = of_phrase.float() @ similarity / of_phrase.sum(1, keepdim=True).clamp(min=1)  # [F, N]
    return inside.gather(1, mean.argmax(1, keepdim=True))[:, 0] & of_phrase.any(1)


def patches_inside(boxes: list[Box], view: Box, grid: tuple[int, int]) -> Tensor:
    """Whether the centre of each patch lies in one of the boxes, borders included: bool [N].

    Args:
        boxes: in pixels of the original picture.
        view: the part of the picture that the model sees, in the same pixels.
        grid: numbers of rows and columns of patches into which the view is divided.
    """
    left, top, right, bottom = view
    rows, columns = grid
    y = top + (torch.arange(rows).double() + 0.5) * (bottom - top) / rows
    x = left + (torch.arange(columns).double() + 0.5) * (right - left) / columns
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        inside |= ((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))
    return inside.flatten()
