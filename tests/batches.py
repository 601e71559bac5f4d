"""Batches of a data set for tests that train an engine without the sampler's order."""

from collections.abc import Iterator

from torch.utils.data import Dataset

from ds_cmli.data.batch import Batch
from ds_cmli.data.build import EvalData


def rank_batches(dataset: Dataset, data: EvalData, size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """A rank's batches: the samples rank, rank + world, ... in their order."""
    numbers = range(rank, len(dataset), world)
    for start in range(0, len(numbers), size):
        yield data.collate([dataset[number] for number in numbers[start : start + size]])
