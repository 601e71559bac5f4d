"""A held-out set as evaluation reads it: every caption without its picture, every picture once.

n captions, m pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from ds_cmli.data.bad import NO_TOKEN, Bad
from ds_cmli.data.batch import Sample


class HeldOut:
    """A data set of pairs, or a `Subset` of one.

    Attributes:
        image_of: int64 [n], the number of each caption's picture; pictures are numbered as they first appear.
        broken: pictures that could not be read, by number; grows while they are.
        at_load: pairs that the data set has left out from the start.
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
        self.first = {number: row for row, number in reversed(list(zip(rows, image_of, strict=True)))}
        self.broken: dict[int, Bad] = {}
        self.at_load: list[Bad] = pairs.rows.bad if hasattr(pairs, "rows") else []

    @property
    def images(self) -> int:
        """m"""
        return len(self.first)

    def file(self, caption: int) -> str:
        """The name of a caption's picture, for the user."""
        return self.pairs.rows.files[self.rows[caption]] if hasattr(self.pairs, "rows") else str(self.rows[caption])

    def captions(self) -> Dataset:
        """All n, without pictures."""
        return _View(self._caption, self.rows)

    def pictures(self, numbers: Sequence[int | None]) -> Dataset:
        """Those of these numbers, each with its first caption; a broken one is black, and so is None."""
        return _View(self._picture, numbers)

    def _caption(self, row: int) -> Sample:
        return replace(self.pairs.pair(row, picture=False), image=torch.zeros(3, 0, 0, dtype=torch.uint8))

    def _picture(self, number: int | None) -> Sample:
        if number is None:
            black = torch.zeros(3, self.pairs.size, self.pairs.size, dtype=torch.uint8)
            sample = self.pairs.pair(self.rows[0], picture=False)
            return replace(sample, image=black, token_picture=None, cell_picture=None)
        sample = self.pairs.pair(self.first[number])
        if sample.bad is not None and sample.bad[1] != NO_TOKEN:
            self.broken[number] = sample.bad
        return sample


class _View(Dataset):
    def __init__(self, read: Callable[[Any], Sample], items: Sequence):
        self.read, self.items = read, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(self.items[index])
