"""Masks of semantic segmentation as they are published: PNG files whose pixels are class numbers.

Shapes: H x W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ds_cmli.common.errors import UserError, first_line
from ds_cmli.data.pictures import formats

IGNORED = -1  # the class of pixels that do not count
# How a PNG's pixels are stored where they are numbers of classes. Those of gray ones of less than
# 8 bits would be read as shades.
INDICES = ("L", "P", "P;1", "P;2", "P;4")


@dataclass(frozen=True)
class Labelled:
    """A picture and its mask."""

    picture: Path
    mask: Path

    def size(self) -> tuple[int, int]:
        """Width and height of the picture, which its mask has too. Raises `UserError`."""
        width, height = size = picture_size(self.picture)
        with self._opened() as mask:
            if mask.size != size:
                self._refuse(
                    f"{mask.width} x {mask.height} pixels, and {self.picture} has {width} x "
                    f"{height}"
                )
        return size

    def classes(self, numbers: Mapping[int, int]) -> Tensor:
        """The class of each pixel, `IGNORED` for none: int64 [H, W].

        Args:
            numbers: the class of each value that a pixel may have.

        Raises:
            UserError: the mask cannot be read, or a pixel has another value.
        """
        table = np.full(256, IGNORED - 1)
        table[list(numbers)] = list(numbers.values())
        with self._opened() as image:
            try:
                values = np.array(image)
            except Exception as error:  # Pillow raises several for damaged files
                self._refuse(first_line(error))
        classes = table[values]
        wrong = np.argwhere(classes < IGNORED)
        if len(wrong):
            row, column = wrong[0]
            self._refuse(f"row {row}, column {column} is {values[row, column]}, which is no class")
        return torch.from_numpy(classes)

    def _opened(self) -> Image.Image:
        try:
            check_file(self.mask)
            image = Image.open(self.mask, formats=["PNG"])
        except Exception as error:  # as above
            self._refuse(first_line(error))
        stored = image.tile[0][3]
        if stored not in INDICES:
            image.close()
            self._refuse(f"its pixels are {stored}, and not class numbers: 8 bits or a palette's")
        return image

    def _refuse(self, problem: str) -> NoReturn:
        raise UserError(f"the mask {self.mask}: {problem}: fetch it again, or repair it")


def check_file(path: Path) -> None:
    if not path.is_file():
        raise OSError("no such file")


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture whose masks or boxes are of its stored pixels.

    Raises:
        UserError: it cannot be read, or is to be turned upright.
    """
    try:
        check_file(path)
        with Image.open(path, formats=formats()) as picture:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1)
            size = picture.size
    except Exception as error:  # as above
        problem = f"cannot be read ({first_line(error)})"
        raise UserError(f"the picture {path} {problem}: fetch it again") from None
    if turned != 1:
        raise UserError(
            f"the picture {path} has the EXIF orientation {turned}, which masks and boxes do not "
            "know: store its pixels upright, or remove the tag"
        )
    return size
