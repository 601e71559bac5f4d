"""The pairs of sources as map-style data sets, their samples, batches and loaders.

B images with a caption each, M text positions (padded), S image size in pixels.
"""

import gc
import hashlib
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_cmli import scopes
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import View
from ds_cmli.data.sampler import Draw
from ds_cmli.data.shard_cache import LostShard
from ds_cmli.data.sources import Source
from ds_cmli.data.tokens import CaptionTokenizer, Tokens
from ds_cmli.distributed.process_group import CollectiveFlags, gather_objects
from ds_cmli.errors import UserError, one_line

MAX_TRIES = 100  # training stops after this many consecutive samples that cannot be used
NUM_NAMED_BAD = 5  # bad samples that messages name
NO_TOKEN = "caption without a token"
Bad = tuple[str, str]  # an image's name, and why it cannot be used
# Padded captions are a multiple of this long: few different shapes, aligned for matrix products.
PAD_MULTIPLE = 8
Share = tuple[Source, Sequence[int] | np.ndarray]  # a source, and the indices of some of its images


def hashed(*content: object) -> int:
    """Return a hash of the content that fits int64, the same on all nodes."""
    digest = hashlib.blake2b(" ".join(map(str, content)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


@dataclass
class Sample:
    image: Tensor  # uint8 [3, S, S]
    tokens: Tokens
    index: int  # the requested index, even if another sample replaces that one
    image_id: int  # identifies the image: all captions of one image have the same number
    bad: Bad | None = None  # the requested sample and why it could not be used


@dataclass
class Batch:
    image: Tensor  # uint8 [B, 3, S, S]
    input_ids: Tensor  # int64 [B, M]
    attention_mask: Tensor  # bool [B, M], False for padding
    token_mask: Tensor  # bool [B, M], True for valid tokens (not [CLS], [SEP], [PAD])
    index: Tensor  # int64 [B], position in the data set
    pair_id: Tensor  # int64 [B, 2], hashes of the image and of its caption: equal for equal ones
    bad: list[Bad]  # the samples that were replaced by others in this batch
    padded: bool  # whether `attention_mask` has any False, known without a CPU-GPU sync

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        with scopes.scope("data"):
            return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self.map(Tensor.pin_memory)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a batch of the tensors that a function returns of this one's."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        changes: dict[str, Any] = {name: function(x) for name, x in tensors.items()}
        return replace(self, **changes)


class Collate:
    """Makes a `Batch` of samples.

    Captions are padded to the longest, a multiple of `PAD_MULTIPLE` but at most the tokenizer's
    `positions`. If the tokenizer is `full`, they are padded to that, and padding is attended to.
    """

    def __init__(self, tokenizer: CaptionTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, samples: list[Sample]) -> Batch:
        ids = [sample.tokens.input_ids for sample in samples]
        positions = self.tokenizer.positions
        lengths = torch.tensor([positions if self.tokenizer.full else len(row) for row in ids])
        longest = -(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
        length = min(longest, positions)
        pair_ids = [(sample.image_id, hashed(sample.tokens.input_ids)) for sample in samples]
        return Batch(
            image=torch.stack([sample.image for sample in samples]),
            input_ids=padded(ids, length, self.tokenizer.pad_id),
            attention_mask=torch.arange(length) < lengths[:, None],
            token_mask=padded([sample.tokens.valid for sample in samples], length, False),
            index=torch.tensor([sample.index for sample in samples]),
            pair_id=torch.tensor(pair_ids),
            bad=[sample.bad for sample in samples if sample.bad],
            padded=int(lengths.min()) < length,
        )


def padded(rows: Sequence[Sequence], length: int, fill: int | bool) -> Tensor:
    """Stack rows, padded with `fill` to [B, length]: int64, or bool if `fill` is one."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


class Images:
    """The images of several sources, or of shares of them, numbered one source after the other."""

    def __init__(self, shares: dict[str, Share]):
        self.names = list(shares)
        self.sources = list(shares.values())
        self.starts = [0, *accumulate(len(indices) for _, indices in self.sources)]

    def __len__(self) -> int:
        return self.starts[-1]

    def source_number(self, index: int) -> int:
        return bisect_right(self.starts, index) - 1

    def locate(self, index: int) -> tuple[Source, int]:
        """Return an image's source, and its index there."""
        number = self.source_number(index)
        source, indices = self.sources[number]
        return source, int(indices[index - self.starts[number]])

    def name(self, index: int) -> str:
        source, source_index = self.locate(index)
        prefix = f"{self.names[self.source_number(index)]}: " if len(self.names) > 1 else ""
        return prefix + source.name(source_index)

    def prefetch(self, indices: np.ndarray) -> None:
        """Announce images [n] that are read soon to those sources that fetch them."""
        for (source, share), (first, end) in zip(self.sources, pairwise(self.starts), strict=True):
            if hasattr(source, "prefetch"):
                announced = indices[(indices >= first) & (indices < end)] - first
                if not isinstance(share, range):
                    announced = share[announced]  # type: ignore[call-overload]  # AllBut takes it
                source.prefetch(announced)

    def captions(self, index: int, only_column: str = "") -> list[tuple[str, str]]:
        """Return an image's captions that are not blank, each after its column, "" if it has none.

        Raises ValueError if there are none. Captions without a column are in each `only_column`.
        """
        source, source_index = self.locate(index)
        captions: list[tuple[str, str]] = []
        for caption in source.captions(source_index):
            column, text = caption if isinstance(caption, tuple) else ("", caption)
            is_wanted = not only_column or column in ("", only_column)
            if is_wanted and text and text.strip():
                captions.append((column, text))
        if not captions:
            raise ValueError("empty caption")
        return captions


class TrainPairs(Dataset):
    """A map-style data set of images, each with one caption and one view, by a hash for each turn.

    A sample whose image or caption cannot be used is replaced by the next usable one of its source.
    So every run replaces it by the same one. `Sample.bad` names it and says why it cannot be used.
    Raises `UserError` after `MAX_TRIES` samples in a row that cannot be used.
    """

    def __init__(self, images: Images, tokenizer: CaptionTokenizer, config: DataConfig, seed: int):
        self.images = images
        self.tokenizer = tokenizer
        self.seed = seed
        self.caption_weights = config.caption_weights
        self.view = View.of(config, seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: int | Draw) -> Sample:
        index, turn = draw if isinstance(draw, Draw) else Draw(draw)
        number = self.images.source_number(index)
        first, end = self.images.starts[number : number + 2]
        bad: list[Bad] = []
        max_tries = min(MAX_TRIES, end - first)
        offset = 0
        while len(bad) < max_tries:
            stand_in = first + (index - first + offset) % (end - first)
            try:
                sample = self._pair(stand_in, turn)
                return replace(sample, index=index, bad=bad[0] if bad else None)
            except UserError:
                raise
            except Exception as error:  # decoders raise nearly any exception for damaged files
                bad.append((self.images.name(stand_in), reason_of(error)))
                # Samples of a lost shard are replaced by different ones of the next shard.
                offset += error.num_samples if isinstance(error, LostShard) else 1
        name, reason = bad[0]
        problem = f"{max_tries} samples in a row cannot be used, from {name} ({reason}) on"
        raise UserError(f"{problem}: mend or remove them")

    def _pair(self, index: int, turn: int) -> Sample:
        tokens = self.tokenizer(self._caption(index, turn))
        if not any(tokens.valid):
            raise ValueError(NO_TOKEN)
        source, source_index = self.images.locate(index)
        image = self.view(source.image(source_index), turn, index)
        return Sample(image, tokens, index, hashed("image", index))

    def _caption(self, index: int, turn: int) -> str:
        captions = self.images.captions(index)
        # Unsigned, as in earlier versions: a resumed run draws the same captions.
        number = hashed(self.seed, turn, index) % 2**64
        if not self.caption_weights:
            _, text = captions[number % len(captions)]
            return text
        num_captions = Counter(column for column, _ in captions)
        weights = [self.caption_weights[column] / num_captions[column] for column, _ in captions]
        ((_, text),) = random.Random(number).choices(captions, weights)
        return text


class EvalPairs:
    """All captions of all images, as evaluations take them: those of one column if it is named."""

    def __init__(self, images: Images, config: DataConfig):
        self.images = images
        self.view = View.of(config)
        self.bad = list[Bad]()  # images whose captions cannot be read, and which are left out
        self.rows: list[tuple[int, str]] = []  # image and text of each caption
        only_column = config.caption_key if config.caption_weights else ""
        images.prefetch(np.arange(len(images)))
        for index in range(len(images)):
            try:
                captions = images.captions(index, only_column)
                self.rows += [(index, text) for _, text in captions]
            except UserError:
                raise
            except Exception as error:
                self.bad.append((images.name(index), reason_of(error)))
        if not self.rows:
            names = ", ".join(images.names)
            raise UserError(f"{names} has no captions to evaluate on (data.caption_key, --data)")

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, row: int) -> Tensor:
        """uint8 [3, S, S]; any exception says why it cannot be used."""
        source, source_index = self.images.locate(self.rows[row][0])
        return self.view(source.image(source_index))

    def name(self, row: int) -> str:
        return self.images.name(self.rows[row][0])


def reason_of(error: Exception) -> str:
    """Return the reason why an image or its captions cannot be used, without the file's path."""
    if isinstance(error, OSError) and error.strerror:
        return "no such file" if isinstance(error, FileNotFoundError) else error.strerror
    return one_line(error)


@dataclass
class BadSamples:
    """The number of samples that training could not use, which counts each draw, and the first."""

    max_share: float  # of the requested samples, or of the data set if that is larger
    length: int  # number of samples in the training set
    count: int = 0  # that this rank has met
    first: list[Bad] = field(default_factory=list)

    def add(self, bad: list[Bad]) -> None:
        self.count += len(bad)
        unseen = [sample for sample in bad if sample not in self.first]
        self.first += unseen[: NUM_NAMED_BAD - len(self.first)]

    def are_too_many(self, count: int, seen: int) -> bool:
        return count > self.max_share * max(seen, self.length)

    def check(self, flags: CollectiveFlags, seen: int = 0) -> list[str]:
        """Return the line about the bad samples of all ranks, if there are any.

        Raises `UserError`, on all ranks, if they are too many of the `seen` samples. Collective.
        """
        gathered = gather_objects((self.count, self.first), flags.group)  # collective
        count = sum(rank_count for rank_count, _ in gathered)
        first = dict.fromkeys(chain.from_iterable(rank_first for _, rank_first in gathered))
        named = ", ".join(bad_texts(list(first)))
        if seen and self.are_too_many(count, seen):
            limit = f"more than data.max_bad_share = {self.max_share}: mend them, or raise it"
            problem = f"{count} samples of {self.length} cannot be used"
            raise UserError(f"{problem}, {limit}. The first: {named}")
        return [f"{count} bad samples were replaced; the first: {named}"] if count else []


def bad_texts(bad: list[Bad]) -> list[str]:
    """Return the first few bad samples as text: ["2.png (no such file)", ...]."""
    return [f"{name} ({reason})" for name, reason in bad[:NUM_NAMED_BAD]]


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
        # The global generator, from which the model's dropout draws, must not change.
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=begin,
        **options,
    )
