"""The pairs of sources as map-style data sets, and their loaders."""

import gc
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_cmli.common import UserError, one_line
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.batch import Bad, Sample, hashed
from ds_cmli.data.images import View
from ds_cmli.data.sampler import Draw, GlobalBatchSampler
from ds_cmli.data.sources import Source
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed.process_group import CollectiveFlags

if TYPE_CHECKING:
    from ds_cmli.data.build import Data

MOST_TRIES = 100  # training stops after this many consecutive samples that cannot be used
SHOWN = 5  # bad samples that messages name
NO_TOKEN = "caption without a token"
Share = tuple[Source, Sequence[int] | np.ndarray]  # and the indices of some of its images


class Images:
    """The images of several sources, or of shares of them, numbered one source after the other."""

    def __init__(self, sources: dict[str, Share]):
        self.sources, self.names = list(sources.values()), list(sources)
        self.starts = [0, *accumulate(len(indices) for _, indices in self.sources)]

    def __len__(self) -> int:
        return self.starts[-1]

    def at(self, index: int) -> tuple[Source, int]:
        """An image's source and its index there."""
        number = bisect_right(self.starts, index) - 1
        source, indices = self.sources[number]
        return source, int(indices[index - self.starts[number]])

    def name(self, index: int) -> str:
        source, place = self.at(index)
        of_source = self.names[bisect_right(self.starts, index) - 1]
        return f"{of_source}: {source.name(place)}" if len(self.names) > 1 else source.name(place)

    def captions(self, index: int) -> list[str]:
        source, place = self.at(index)
        captions = [text for text in source.captions(place) if text and text.strip()]
        if not captions:
            raise ValueError("empty caption")
        return captions


class TrainPairs(Dataset):
    """A map-style data set of images, each with one caption and one view, by a hash for each turn.

    A sample whose image or caption cannot be used is replaced by the next usable one of its source,
    which is always the same; `Sample.bad` records that. `MOST_TRIES` of them are a `UserError`.
    """

    def __init__(self, images: Images, tokenizer: CaptionTokenizer, config: DataConfig, seed: int):
        self.images, self.tokenizer, self.seed = images, tokenizer, seed
        self.view = View.of(config, seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: int | Draw) -> Sample:
        index, turn = at if isinstance(at, Draw) else Draw(at)
        source = bisect_right(self.images.starts, index)
        first, end = self.images.starts[source - 1 : source + 1]
        bad, tries = list[Bad](), min(MOST_TRIES, end - first)
        for step in range(tries):
            taken = first + (index - first + step) % (end - first)
            try:
                sample = self._pair(taken, turn)
            except Exception as error:  # decoders raise nearly any exception for damaged files
                bad.append((self.images.name(taken), described(error)))
            else:
                return replace(sample, index=index, bad=bad[0] if bad else None)
        raise UserError(
            f"{tries} samples in a row cannot be used, from {bad[0][0]} ({bad[0][1]}) on: mend or "
            "remove them"
        )

    def _pair(self, index: int, turn: int) -> Sample:
        captions = self.images.captions(index)
        tokens = self.tokenizer(captions[hashed(self.seed, turn, index) % 2**64 % len(captions)])
        if not any(tokens.valid):
            raise ValueError(NO_TOKEN)
        source, place = self.images.at(index)
        image = self.view(source.image(place), turn, index)
        return Sample(image, tokens, index, hashed("image", index))


class EvalPairs:
    """All captions of all images, as evaluations take them."""

    def __init__(self, images: Images, config: DataConfig):
        self.images, self.view = images, View.of(config)
        self.bad = list[Bad]()  # images whose captions cannot be read, and which are left out
        self.rows: list[tuple[int, str]] = []  # image and text of each caption
        for index in range(len(images)):
            try:
                self.rows += [(index, caption) for caption in images.captions(index)]
            except Exception as error:
                self.bad.append((images.name(index), described(error)))

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, row: int) -> Tensor:
        """uint8 [3, S, S]; any exception says why it cannot be used."""
        source, place = self.images.at(self.rows[row][0])
        return self.view(source.image(place))

    def name(self, row: int) -> str:
        return self.images.name(self.rows[row][0])


def described(error: Exception) -> str:
    """Why an image or its captions cannot be used, without the file's path."""
    if isinstance(error, OSError) and error.strerror:
        return "no such file" if isinstance(error, FileNotFoundError) else error.strerror
    return one_line(error)


@dataclass
class BadSamples:
    """How many samples training could not use, and the first; one counts each time it is drawn."""

    max_share: float  # of the whole data set, until more samples than that have been requested
    length: int  # number of samples in the training set
    count: int = 0  # that this rank has met
    first: list[Bad] = field(default_factory=list)

    def add(self, bad: list[Bad]) -> None:
        self.count += len(bad)
        self.first += [one for one in bad if one not in self.first][: SHOWN - len(self.first)]

    def check(self, flags: CollectiveFlags, seen: int = 0) -> list[str]:
        """The line about those of all ranks, if any. Collective.

        Raises `UserError` on all ranks if they are too many of the `seen` samples.
        """
        counts, first = zip(*flags.gather((self.count, self.first)), strict=True)  # collective
        count, named = sum(counts), ", ".join(told([*dict.fromkeys(chain.from_iterable(first))]))
        if seen and count > self.max_share * max(seen, self.length):
            raise UserError(
                f"{count} samples of {self.length} cannot be used, more than data.max_bad_share = "
                f"{self.max_share}: mend or remove them, or raise it. The first: {named}"
            )
        return [f"{count} bad samples were replaced; the first: {named}"] if count else []


def told(bad: list[Bad]) -> list[str]:
    """The first few bad samples as text: ["2.png (no such file)", ...]."""
    return [f"{name} ({reason})" for name, reason in bad[:SHOWN]]


def train_loader(
    data: "Data",
    sampler: GlobalBatchSampler,
    workers: int,
    worker_init: Callable[[int], None] | None = None,
) -> DataLoader:
    """An endless loader of this rank's `Batch`es, from the sampler's consumed position on.

    Each of the `workers` loading processes prepares two batches ahead.
    """
    own = {"batch_sampler": sampler, "persistent_workers": workers > 0}
    return loader(data.train, data.collate, workers, worker_init, **own)


def loader(
    dataset: Dataset | Sequence,
    collate: Callable,
    workers: int,
    worker_init: Callable[[int], None] | None = None,
    **options,
) -> DataLoader:
    """A loader whose processes are forked, and share what the sources hold."""

    def begin(worker: int) -> None:
        # The garbage collector would write to all objects that the training has made, and
        # copy-on-write would copy some 100 MB into this process. Frozen objects are skipped.
        gc.freeze()
        if worker_init is not None:
            worker_init(worker)

    return DataLoader(
        dataset,  # type: ignore[arg-type]  # a sequence is one
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        # Of its own: the processes' seeds would be drawn from that which the model's dropout uses.
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=begin,
        **options,
    )
