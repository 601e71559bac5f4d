"""What a source of pairs is: pictures, each with one or more captions, read one by one in any order.

n pictures.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ds_cmli.common.errors import UserError
from ds_cmli.data.bad import EMPTY, Bad, Refused

HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000


class Source(ABC):
    """Map-style: `len` and `read`. It is copied into loading processes, so it keeps no Python object a picture.

    Attributes:
        where: its name for the user.
        bad: what has been left out when it was opened; `len` does not count it.
    """

    where: str
    bad: list[Bad]

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures."""

    @abstractmethod
    def image(self, index: int) -> bytes:
        """The picture's file, undecoded. Raises `Refused` or `OSError` where it cannot be read."""

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """At least one, none of them empty. Raises `Refused` or `OSError` where they cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What the picture is called, for the user."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same where a run goes on: its numbers, the names and sizes of its files."""

    def read(self, index: int) -> tuple[bytes, list[str], str]:
        """The undecoded picture, its captions, and its name; raises as `image` and `captions`."""
        return self.image(index), self.captions(index), self.name(index)

    def key(self, index: int) -> bytes:
        """What tells pictures of this source apart, the same on all nodes; needs no picture to be read."""
        return str(index).encode()

    def priorities(self) -> np.ndarray:
        """uint64 [n], the lowest are held out where there is no validation set: random, and always the same."""
        x = np.arange(1, len(self) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # SplitMix64
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Part(Source):
    """Some of a source's pictures, in the order of `indices` (int [n])."""

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

    def key(self, index: int) -> bytes:
        return self.source.key(int(self.indices[index]))

    def fingerprint(self) -> dict[str, Any]:
        return {**self.source.fingerprint(), "pictures": len(self)}


@dataclass
class Parts:
    """What one `--data` gives."""

    train: Source
    validation: Source | None = None
    test: Source | None = None
    notices: list[str] = field(default_factory=list)  # what the user should know before the run, a line each


def hold_out(source: Source) -> tuple[Source, Source]:
    """All pictures but some, and these: `HELD_OUT_SHARE`, at least 1 and at most `HELD_OUT_MOST`.

    Raises:
        UserError: there are fewer than two.
    """
    if len(source) < 2:
        raise UserError(
            f"{source.where} names {len(source)} images with a caption ({len(source.bad)} without): "
            "give at least 2, as one is held out for validation"
        )
    count = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(source))))
    chosen = np.zeros(len(source), dtype=bool)
    chosen[np.argpartition(source.priorities(), count - 1)[:count]] = True
    kept, held_out = (np.flatnonzero(x).astype(np.uint32) for x in (~chosen, chosen))
    return Part(source, kept, source.bad), Part(source, held_out, [])  # what is bad is told once


def usable(captions: list[str]) -> list[str]:
    """Those that say something; raises `Refused` where none does."""
    found = [caption for caption in captions if caption.strip()]
    if not found:
        raise Refused(EMPTY)
    return found
