"""A held-out set as evaluation reads it: all captions without their pictures, and each picture once.

n captions, m pictures, B of them in a batch, S image size in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from ds_cmli.data.bad import NO_TOKEN, Bad
from ds_cmli.data.batch import NO_PICTURE, Sample

FILLER = -1  # the number of an item that only pads a rank's share to the same number of batches


@dataclass
class Picture:
    image: torch.Tensor  # uint8 [3, S, S]
    number: int
    cell_picture: list[int] | None = None  # only for scenes, see `Batch`
    bad: Bad | None = None  # its name and why it cannot be read
    target: int = 0  # its class, if pictures have classes


@dataclass
class PictureBatch:
    image: torch.Tensor  # uint8 [B, 3, S, S]
    number: torch.Tensor  # int64 [B]
    cell_picture: torch.Tensor  # int64 [B, 2, 2]
    broken: dict[int, Bad]  # the pictures that cannot be read, by number
    target: torch.Tensor  # int64 [B]

    def pin_memory(self) -> "PictureBatch":
        return replace(self, image=self.image.pin_memory())


def collate_pictures(pictures: list[Picture]) -> PictureBatch:
    return PictureBatch(
        torch.stack([p.image for p in pictures]),
        torch.tensor([p.number for p in pictures]),
        torch.tensor([p.cell_picture or [NO_PICTURE] * 4 for p in pictures]).view(-1, 2, 2),
        {p.number: p.bad for p in pictures if p.bad is not None},
        torch.tensor([p.target for p in pictures]),
    )


class HeldOut:
    """The captions and the pictures of a data set of pairs, or of a `Subset` of one.

    Attributes:
        image_of: int64 [n], the number of each caption's picture; pictures are numbered in order of first appearance.
        at_load: pairs that the data set left out at load.
    """

    def __init__(self, dataset: Dataset):
        pairs: Any = dataset
        rows: Sequence[int] = range(len(pairs))
        if isinstance(dataset, Subset):
            pairs, rows = dataset.dataset, dataset.indices
        self.pairs, self.rows = pairs, rows
        numbers: dict[int, int] = {}
        image_of = [numbers.setdefault(pairs.image_id(row), len(numbers)) for row in rows]
        self.image_of = torch.tensor(image_of)
        self.first = {
            number: row for row, number in reversed(list(zip(rows, image_of, strict=True)))
        }
        self.at_load: list[Bad] = getattr(pairs, "bad", [])

    @property
    def images(self) -> int:
        """m, the number of pictures."""
        return len(self.first)

    def file(self, caption: int) -> str:
        """The name of a caption's picture, for messages."""
        return self.pairs.name(self.rows[caption])

    def captions(self, numbers: Sequence[int]) -> Dataset:
        """A data set of `Sample`s without image; `index` is the caption's number, and `FILLER` has the first's text."""
        return View(self._caption, numbers)

    def pictures(self, numbers: Sequence[int]) -> Dataset:
        """A data set of `Picture`s; broken ones and `FILLER` are black."""
        return View(self._picture, numbers)

    def _caption(self, number: int) -> Sample:
        sample = self.pairs.pair(self.rows[max(number, 0)], picture=False)
        return replace(
            sample, image=torch.zeros(3, 0, 0, dtype=torch.uint8), index=number, bad=None
        )

    def _picture(self, number: int) -> Picture:
        if number == FILLER:
            return Picture(
                torch.zeros(3, self.pairs.size, self.pairs.size, dtype=torch.uint8), FILLER
            )
        sample = self.pairs.pair(self.first[number])
        bad = sample.bad if sample.bad is not None and sample.bad[1] != NO_TOKEN else None
        return Picture(sample.image, number, sample.cell_picture, bad)


class View(Dataset):
    """The map-style data set of `read(item)` for each of `items`."""

    def __init__(self, read: Callable[[Any], Any], items: Sequence):
        self.read, self.items = read, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(self.items[index])
