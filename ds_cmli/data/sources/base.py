"""The interface of a source of pairs: pictures with one or more captions each, in any order.

n pictures.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import filterfalse
from pathlib import Path

import numpy as np

from ds_cmli.common.errors import UserError, printable
from ds_cmli.data.bad import EMPTY, Bad, Refused

HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000
BLOCKS, BLOCK_BYTES = 256, 2**18  # of large data, what is compared when a run resumes
MOST_NAMED = 10  # columns that are not read


class Source(ABC):
    """A map-style source of pictures and captions.

    It is opened before the loading processes are forked (or, with another start method, pickled),
    and all of them read it. Therefore:

    * no Python object for each picture: reference counts would copy its memory into each process;
      `listed.Strings` and (memory-mapped) arrays are shared;
    * no file that is open before the fork is read by `seek` and `read`, as all processes share its
      position, and the first pairs are read before: read with `os.pread`, or keep with the open
      file `os.getpid()` of the process that opened it. Open files do not belong into the pickled
      state (`tars.Tars` leaves them out).

    Attributes:
        where: its name in messages.
        bad: samples that were left out when it was opened; `len` does not count them.
    """

    where: str
    bad: list[Bad]

    @abstractmethod
    def __len__(self) -> int:
        """The number of pictures, n."""

    @abstractmethod
    def image(self, index: int) -> bytes:
        """The content of the picture's file, undecoded.

        Raises `Refused` or `OSError` if it cannot be read.
        """

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """The picture's captions: at least one, none empty.

        Raises `Refused` or `OSError` if they cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """The picture's name in messages."""

    @abstractmethod
    def fingerprint(self) -> Mapping[str, object]:
        """What must be equal when a run resumes, to be written as JSON.

        For instance the number of pictures and the names and sizes of files.
        """

    def not_read(self) -> list[str]:
        """What its files hold besides pictures and captions, in a few words each, to be printed."""
        return []

    def key(self, index: int) -> bytes:
        """An identifier of the picture in this source, the same on all nodes.

        It does not need to read the picture.
        """
        return str(index).encode()

    def priorities(self) -> np.ndarray:
        """Pseudorandom numbers, uint64 [n], always the same.

        The lowest are held out if there is no validation set.
        """
        return scattered(len(self))

    def identities(self) -> np.ndarray:
        """Numbers, uint64 [n], equal for the same stored picture in all sources of this process."""
        return numbered(self.where, len(self))

    def caption_counts(self) -> np.ndarray | None:
        """The number of captions of each picture, int64 [n]; None if only reading could tell."""
        return None

    def caption_bytes(self) -> np.ndarray:
        """The most bytes that a caption of each picture can have, int64 [n], without reading."""
        return np.zeros(len(self), dtype=np.int64)


def scattered(count: int) -> np.ndarray:
    """Pseudorandom numbers, uint64 [count], all different and always the same: SplitMix64."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def numbered(place: str, count: int) -> np.ndarray:
    """`Source.identities` of the `count` pictures that are stored together in `place`."""
    return scattered(count) ^ np.uint64(hash(place) & 0xFFFF_FFFF_FFFF_FFFF)


class SourcePart(Source):
    """The pictures of a source that `indices` (int [n]) lists, in that order."""

    def __init__(self, source: Source, indices: np.ndarray, bad: list[Bad]):
        self.source, self.indices, self.bad, self.where = source, indices, bad, source.where

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> bytes:
        return self.source.image(int(self.indices[index]))

    def captions(self, index: int) -> list[str]:
        return self.source.captions(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def not_read(self) -> list[str]:
        return self.source.not_read()

    def key(self, index: int) -> bytes:
        return self.source.key(int(self.indices[index]))

    def fingerprint(self) -> Mapping[str, object]:
        return {**self.source.fingerprint(), "pictures": len(self)}

    def identities(self) -> np.ndarray:
        return self.source.identities()[self.indices]

    def caption_counts(self) -> np.ndarray | None:
        counts = self.source.caption_counts()
        return None if counts is None else counts[self.indices]

    def caption_bytes(self) -> np.ndarray:
        return self.source.caption_bytes()[self.indices]


@dataclass
class Parts:
    """The parts of one `--data`."""

    train: Source
    validation: Source | None = None
    test: Source | None = None
    notices: list[str] = field(default_factory=list)  # lines to print for the user before the run


def hold_out(source: Source, wanted: float | None = None) -> tuple[Source, Source]:
    """Split a source into a training part and a held-out part, which are returned in this order.

    Args:
        wanted: as `data.held_out`; at least one picture is held out.

    Raises:
        UserError: the source has fewer than two pictures, or none would be left.
    """
    if len(source) < 2:
        raise UserError(
            f"{source.where} names {len(source)} images with a caption ({len(source.bad)} "
            "without): give at least 2, as one is held out for validation"
        )
    count = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(source))))
    if wanted is not None:
        pictures = wanted
        if wanted < 1:
            pictures = wanted * len(source)
        count = max(1, round(pictures))
    if count >= len(source):
        raise UserError(
            f"data.held_out is {wanted:g}, which leaves none of the {len(source)} pictures of "
            f"{source.where} to train on: give less"
        )
    chosen = np.zeros(len(source), dtype=bool)
    chosen[np.argpartition(source.priorities(), count - 1)[:count]] = True
    kept = SourcePart(source, np.flatnonzero(~chosen).astype(np.uint32), source.bad)
    # Bad samples are reported once.
    held_out = SourcePart(source, np.flatnonzero(chosen).astype(np.uint32), [])
    return kept, held_out


def sampled(paths: Sequence[Path]) -> str:
    """A digest of the content of files; of more than 64 MiB in all, or many, of spread blocks."""
    paths = paths[:: -(-len(paths) // BLOCKS) or 1]
    step = max(BLOCK_BYTES, sum(map(os.path.getsize, paths)) // BLOCKS)
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            for start in range(0, os.path.getsize(path), step):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def first_twice(names: Sequence[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name in names if names.count(name) > 1), None)


def unused(what: str, names: Iterable[str], used: Sequence[str]) -> list[str]:
    """The columns or keys that are not used, as `Source.not_read` names them; [] if all are."""
    others = list(map(printable, filterfalse(used.__contains__, names)))
    if len(others) > MOST_NAMED:
        others = [*others[:MOST_NAMED], f"{len(others) - MOST_NAMED} more"]
    if not others:
        return []
    return [f"{what} {', '.join(others)}"]


def check_unicode(text: str) -> None:
    """Raise `Refused` if a text holds half of a surrogate pair, as JSON can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"no Unicode ({error.reason})") from None


def usable(captions: list[str]) -> list[str]:
    """The captions that are not blank; raises `Refused` if all are, or one is no Unicode."""
    filled = list(filter(str.strip, captions))
    if not filled:
        raise Refused(EMPTY)
    for caption in filled:
        check_unicode(caption)
    return filled
