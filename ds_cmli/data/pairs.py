"""The pairs of a folder as a data set. S image size in pixels."""

import hashlib
import os
from dataclasses import replace

import torch
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import NO_TOKEN, Bad
from ds_cmli.data.batch import Sample
from ds_cmli.data.folder import Rows
from ds_cmli.data.pictures import Refused, read_picture
from ds_cmli.data.tokens import CaptionTokenizer

MOST_TRIES = 100  # samples in a row that cannot be used before giving up


class FolderPairs(Dataset):
    """Map-style dataset over `Rows`: image uint8 [3, S, S], shorter side resized to S (bicubic), centre cropped.

    A sample whose image cannot be read or whose caption has no valid token is replaced by the next one that can be
    used, always the same one, and says so in `Sample.bad`.

    Raises:
        UserError: `MOST_TRIES` samples in a row cannot be used.
    """

    def __init__(self, rows: Rows, tokenizer: CaptionTokenizer, config: DataConfig):
        self.rows, self.tokenizer, self.config, self.size = rows, tokenizer, config, config.image_size
        self.root = os.path.realpath(rows.root)

    def __len__(self) -> int:
        return len(self.rows.files)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first_bad: Bad | None = None
        tries = min(MOST_TRIES, len(self))
        for step in range(tries):
            sample = self.pair((index + step) % len(self))
            if sample.bad is None:
                return replace(sample, index=index, bad=first_bad)
            first_bad = first_bad or sample.bad
        assert first_bad is not None
        raise UserError(
            f"{tries} samples in a row of {self.rows.folder} cannot be used, from {first_bad[0]} ({first_bad[1]}) on: "
            "mend or remove them"
        )

    def pair(self, index: int, picture: bool = True) -> Sample:
        """The sample itself, also where it cannot be used: `bad` says why, and what is missing of the image is black.

        Without `picture` no file is opened.
        """
        tokens = self.tokenizer(self.rows.texts[index])
        image = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        reason = None if any(tokens.valid) else NO_TOKEN
        if picture:
            try:
                path = self.rows.folder / self.rows.files[index]
                limits = self.config.max_pixels, self.config.follow_symlinks
                image = read_picture(path, self.root, self.size, *limits)
            except FileNotFoundError:
                reason = "no such file"
            except Refused as error:
                reason = str(error)
            except Exception as error:  # decoders of damaged files raise nearly anything
                reason = f"{type(error).__name__}: {error}".replace("\n", " ").replace(str(path), "").strip(": ")
        bad = None if reason is None else (self.rows.files[index], reason)
        return Sample(image, tokens, index, image_id=self.image_id(index), bad=bad)

    def image_id(self, index: int) -> int:
        """A number of the picture's file, symlinks followed: the same for all captions of a picture, on all nodes."""
        file = os.path.realpath(self.rows.folder / self.rows.files[index]).removeprefix(self.root)
        digest = hashlib.blake2b(os.fsencode(file), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)
