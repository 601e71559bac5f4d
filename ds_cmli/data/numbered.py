"""The pictures of several sources under one numbering, and why some cannot be used."""

import hashlib
from bisect import bisect_right
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Bad, Refused
from ds_cmli.data.pictures import decode
from ds_cmli.data.sources.base import Source
from ds_cmli.data.transforms import Framing, View


class Pictures:
    """The pictures of several sources, numbered one source after the other."""

    def __init__(self, sources: list[Source], config: DataConfig):
        self.sources, self.config = sources, config
        self.starts = [0, *accumulate(map(len, sources))]  # each source's first picture
        self.first = _first_of_each(sources)
        self.framing = Framing.of(config)

    def __len__(self) -> int:
        return self.starts[-1]

    def at(self, index: int) -> tuple[int, int]:
        """The number of a picture's source, and the picture's index in that source."""
        source = bisect_right(self.starts, index) - 1
        return source, index - self.starts[source]

    def name(self, index: int) -> str:
        number, place = self.at(index)
        source = self.sources[number]
        name = source.name(place)
        if len(self.sources) == 1:
            return name
        return f"{source.where}: {name}"

    def image_id(self, index: int) -> int:
        """A hash that identifies the picture: equal for all captions, sources and nodes."""
        number, place = self.at(index if self.first is None else int(self.first[index]))
        key, salt = self.sources[number].key(place), number.to_bytes(8, "little")
        digest = hashlib.blake2b(key, digest_size=8, salt=salt).digest()
        return int.from_bytes(digest, "big", signed=True)

    def captions(self, index: int) -> list[str]:
        number, place = self.at(index)
        return self.sources[number].captions(place)

    def image(self, index: int, view: View | None = None) -> tuple[Tensor, str | None]:
        """The part of the picture that `view` chooses, as `decode` gives it, and None.

        Of a picture that cannot be used, a black image and why.
        """
        number, place = self.at(index)
        config = self.config
        try:
            content = self.sources[number].image(place)
            image = decode(content, self.framing, config.max_pixels, view)
            return image, None
        except Exception as error:  # decoders raise nearly any exception for damaged files
            return self.black(), describe(error)

    def black(self) -> Tensor:
        return black(self.config.image_size)


def black(size: int) -> Tensor:
    """What is shown in the place of a picture that cannot be used: uint8 [3, size, size]."""
    return torch.zeros(3, size, size, dtype=torch.uint8)


def _first_of_each(sources: list[Source]) -> np.ndarray | None:
    """The first picture of all sources that is the same as each, int64 [n]; None if all differ."""
    if len(sources) == 1:
        return None
    identities = np.concatenate([source.identities() for source in sources])
    _, first, number = np.unique(identities, return_index=True, return_inverse=True)
    return None if len(first) == len(identities) else first[number]


def of_sources(sources: list[Source]) -> list[Bad]:
    """What was left out at load, each with its source's name if there are several."""
    if len(sources) == 1:
        return list(sources[0].bad)
    reasons = []
    for source in sources:
        reasons += [(f"{source.where}: {name}", reason) for name, reason in source.bad]
    return reasons


def describe(error: Exception) -> str:
    """Describe why a picture or its captions cannot be used, without the file's path."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Refused):
        return str(error)
    path = str(getattr(error, "filename", None) or "")
    return f"{type(error).__name__}: {error}".replace("\n", " ").replace(path, "").strip(": '")
