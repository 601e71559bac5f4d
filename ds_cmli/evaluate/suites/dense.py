"""Patches where they lie in a picture: maps of scores over its pixels, features of its boxes.

Shapes: Q names of C classes, W x H pixels, h x w patches (N together), D embedding dimension, F
boxes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.contrastive import unit_rows, upcast
from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import Resize
from ds_cmli.data.aspect import Grid, overlaps
from ds_cmli.data.transforms import Box, PixelBox
from ds_cmli.evaluate.model import EvaluatedModel, PictureFile
from ds_cmli.evaluate.suites.masks import IGNORED

PICTURES = 256  # how many pictures' patches are held at a time
PIXELS = 2**23  # of how many, over all names' maps, scores are in memory at a time


class Part(NamedTuple):
    """A part of a picture, and the patches that a model has of it."""

    box: Box  # left, top, right, bottom in pixels
    patches: Tensor  # [N, D], of unit length
    grid: Grid  # h, w


def seeing_whole(model: EvaluatedModel) -> EvaluatedModel:
    """The model, shown whole pictures: in their own aspect if it takes that, or else resized."""
    data = model.config.data
    if data.aspect_patch or data.resize.startswith("squash"):
        return model
    resize: Resize = "squash_pillow" if data.resize.endswith("_pillow") else "squash"
    return replace(model, config=replace(model.config, data=replace(data, resize=resize)))


def parts(model: EvaluatedModel, views: Sequence[tuple[Path, Box]]) -> Iterator[Part]:
    """Yield the patches of each part of a picture."""
    for start in range(0, len(views), PICTURES):
        some = views[start : start + PICTURES]
        images = model.images(list(starmap(PictureFile, some)))
        for row, (_, box) in enumerate(some):
            yield Part(box, images.patches_of(row), images.grid_of(row))


def windows(size: tuple[int, int], side: float) -> list[Box]:
    """Squares that cover a picture, each half a side from the next; the last ones end with it.

    Args:
        size: W, H.
        side: of a square in pixels, at most the picture's shorter side; it is 1 at least.
    """
    side = max(side, 1.0)
    starts = []
    for length in size:
        last = length - side
        count = math.ceil(last / (side / 2) - 1e-9) + 1
        starts.append([min(number * side / 2, last) for number in range(count)])
    boxes = []
    for top in starts[1]:
        for left in starts[0]:
            x, y = round(left), round(top)
            boxes.append((x, y, max(round(left + side), x + 1), max(round(top + side), y + 1)))
    return boxes


def predicted(
    parts: Sequence[Part],
    size: tuple[int, int],
    vectors: Tensor,
    class_of: Tensor,
    scale: float,
    least: float = 0.0,
) -> Tensor:
    """The class of each pixel: int64 [H, W].

    Args:
        parts: of the picture, which they cover; where they overlap, their mean counts.
        size: W, H.
        vectors: fp32 [Q, D], of `class_vectors`.
        class_of: int64 [Q].
        scale: 1/temperature of the softmax over names.
        least: pixels whose best name has a lower probability are of class 0, the background.

    Raises:
        UserError: a score is NaN.
    """
    width, height = size
    times = vectors.new_zeros(height, width)
    for left, top, right, bottom in (part.box for part in parts):
        times[top:bottom, left:right] += 1
    best = torch.full_like(times, -torch.inf)
    name, total = torch.zeros_like(times, dtype=torch.int64), best
    names = max(1, PIXELS // (width * height))
    for start in range(0, len(vectors), names):
        some = vectors[start : start + names]
        scores = vectors.new_zeros(len(some), height, width)
        for (left, top, right, bottom), patches, grid in parts:
            cosines = (some @ upcast(patches.to(some.device)).t()).view(1, len(some), *grid)
            shape = bottom - top, right - left
            scores[:, top:bottom, left:right] += F.interpolate(cosines, shape, mode="bilinear")[0]
        scores /= times
        highest, number = scores.max(0)
        name = torch.where(highest > best, number + start, name)
        best = torch.maximum(best, highest)
        if least:
            total = torch.logaddexp(total, (scale * scores).logsumexp(0))
    if best.isnan().any():  # CPU-GPU sync
        raise UserError("the model's scores are NaN: its weights are not finite")
    classes = class_of[name]
    if least:
        classes[(scale * best - total).exp() < least] = 0
    return classes


def areas(prediction: Tensor, mask: Tensor, classes: int) -> Tensor:
    """The pixels of each class in both, in the prediction and in the mask: int64 [3, C].

    Pixels that the mask ignores do not count.
    """
    shown = mask != IGNORED
    prediction, mask = prediction[shown], mask[shown]
    kinds = prediction[prediction == mask], prediction, mask
    return torch.stack([pixels.bincount(minlength=classes) for pixels in kinds])


def pooled(patches: Tensor, grid: Grid, size: tuple[int, int], boxes: list[PixelBox]) -> Tensor:
    """The mean patch of each box, of unit length; a patch counts by its overlap: fp32 [F, D].

    Args:
        patches: [N, D], of the whole picture.
        grid: h, w.
        size: W, H.
        boxes: in pixels; each overlaps the picture.
    """
    shares = torch.tensor([boxes], dtype=torch.float64) / torch.tensor([*size, *size])
    weights = overlaps(shares, torch.tensor([grid]), len(patches))[0].float()
    return unit_rows(weights.to(patches.device) @ upcast(patches))
