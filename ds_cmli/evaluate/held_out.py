"""A held-out set as evaluation reads it: all captions without their pictures, each picture once.

n captions, m pictures, B of them in a batch, S image size in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ds_cmli.data.batch import NO_PICTURE, Bad, Sample
from ds_cmli.data.images import black
from ds_cmli.data.pairs import NO_TOKEN

FILLER = -1  # the number of an item that only pads a rank's share to the same number of batches
Read = TypeVar("Read")


class HeldOutPairs(Protocol):
    """A data set of captions and their pictures: `data.pairs.EvalPairs`, scenes, or `Entities`."""

    size: int  # S

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """The name of the picture of caption `row`, for messages."""

    def image_id(self, row: int) -> int:
        """A number that is equal for all captions of one picture."""

    def pair(self, row: int, picture: bool = True) -> Sample:
        """The sample, with a black image without `picture`; `bad` says why it cannot be used."""


@dataclass
class Picture:
    image: Tensor  # uint8 [3, S, S]
    number: int
    cell_picture: Sequence[int] = (NO_PICTURE,) * 4  # only for scenes, see `Batch`
    bad: Bad | None = None  # its name and why it cannot be read
    target: int = 0  # its class, if pictures have classes


@dataclass
class PictureBatch:
    image: Tensor  # uint8 [B, 3, S, S]
    number: Tensor  # int64 [B]
    cell_picture: Tensor  # int64 [B, 2, 2]
    broken: dict[int, Bad]  # the pictures that cannot be read, by number
    target: Tensor  # int64 [B]

    def pin_memory(self) -> "PictureBatch":
        return replace(self, image=self.image.pin_memory())

    def usable(self) -> Tensor:
        """Whether an item is a picture that could be read, and no filler: bool [B]."""
        return (self.number >= 0) & ~torch.isin(self.number, torch.tensor([*self.broken]).long())


def collate_pictures(pictures: list[Picture]) -> PictureBatch:
    columns = {name: list(map(attrgetter(name), pictures)) for name in Picture.__match_args__}
    return PictureBatch(
        image=torch.stack(columns["image"]),
        number=torch.tensor(columns["number"]),
        cell_picture=torch.tensor(columns["cell_picture"]).view(-1, 2, 2),
        broken={picture.number: picture.bad for picture in pictures if picture.bad is not None},
        target=torch.tensor(columns["target"]),
    )


class HeldOut:
    """The captions and the pictures of a data set of pairs, or of a `Subset` of one.

    Attributes:
        image_of: int64 [n], the number of each caption's picture; pictures are numbered in order of
            first appearance.
        at_load: pairs that the data set left out at load.
    """

    def __init__(self, dataset: Dataset):
        """`dataset` is a `HeldOutPairs`, or a `Subset` of one."""
        pairs: Any = dataset
        rows: Sequence[int] = range(len(pairs))
        if isinstance(dataset, Subset):
            pairs, rows = dataset.dataset, dataset.indices
        self.pairs: HeldOutPairs = pairs
        self.rows = rows
        self.first: list[int] = []  # the row of each picture's first caption
        numbers: dict[int, int] = {}
        image_of = []
        for row in self.rows:
            number = numbers.setdefault(self.pairs.image_id(row), len(numbers))
            if number == len(self.first):
                self.first.append(row)
            image_of.append(number)
        self.image_of = torch.tensor(image_of)
        self.at_load: list[Bad] = getattr(self.pairs, "bad", [])

    @property
    def images(self) -> int:
        """m, the number of pictures."""
        return len(self.first)

    def file(self, caption: int) -> str:
        """The name of a caption's picture, for messages."""
        return self.pairs.name(self.rows[caption])

    def captions(self, numbers: Sequence[int]) -> Dataset:
        """A data set of `Sample`s without image.

        `index` is the caption's number, and `FILLER` has the first's text.
        """
        return NumberedView(self._caption, numbers)

    def pictures(self, numbers: Sequence[int]) -> Dataset:
        """A data set of `Picture`s; broken ones and `FILLER` are black."""
        return NumberedView(self._picture, numbers)

    def _caption(self, number: int) -> Sample:
        sample = self.pairs.pair(self.rows[max(number, 0)], picture=False)
        return replace(sample, image=black(0), index=number, bad=None)

    def _picture(self, number: int) -> Picture:
        if number == FILLER:
            return Picture(black(self.pairs.size), FILLER)
        sample = self.pairs.pair(self.first[number])
        bad = sample.bad if sample.bad is not None and sample.bad[1] != NO_TOKEN else None
        return Picture(sample.image, number, sample.cell_picture, bad)


class NumberedView(Dataset[Read]):
    """The map-style data set of `read(number)` for each of `numbers`."""

    def __init__(self, read: Callable[[int], Read], numbers: Sequence[int]):
        self.read, self.numbers = read, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Read:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(self.numbers[index])
