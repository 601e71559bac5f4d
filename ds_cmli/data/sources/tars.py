"""WebDataset tars, as img2dataset writes them, read in place: nothing is unpacked or copied."""

import hashlib
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from contextlib import suppress
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import parse
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Bad, Refused, told
from ds_cmli.data.pictures import check_bytes, most_bytes
from ds_cmli.data.sources.base import (
    Parts,
    Source,
    numbered,
    sampled,
    unused,
    usable,
)
from ds_cmli.data.sources.find import part_of
from ds_cmli.data.sources.tar_index import Indexed, add_not_read, index
from ds_cmli.data.sources.tar_members import BLOCK, NotRead

# Keys that are searched in a sample's .json if it has no .txt.
CAPTION_KEYS = ("caption", "captions", "text")
WANTED = "a sample is NAME.jpg (.jpeg, .png, .webp) and NAME.txt or NAME.json"
MOST_TEXT_BYTES = 2**26  # a longer .txt or .json is no caption
# Shards kept open: there may be thousands, but a process may only open 1,024 files by default.
MOST_OPEN = 64


def load_tars(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open tar shards.

    Raises `UserError` if a shard cannot be read, or all together hold no usable sample.
    """
    tars = Tars(name, files, config)
    if not len(tars):
        reason = "no image among their members"
        if tars.bad:
            reason = f"the first: {told(tars.bad)[0]}"
        raise UserError(
            f"data.source is {name!r}: its {len(files)} tars hold no pair ({reason}): {WANTED}"
        )
    parts = sorted(set(filter(None, map(part_of, files))))
    notices = []
    if len(parts) > 1:
        notices.append(
            f"{name} has shards of {' and '.join(parts)} by their names, and all are one part: "
            "give those to evaluate on by --val-data"
        )
    return Parts(tars, notices=notices)


class Tars(Source):
    """Samples of an image and its captions.

    The caption is the .txt, or else the first of `CAPTION_KEYS` in the .json: a text or a list of
    texts. If `data.caption_key` is given, that key of the .json is used instead.
    """

    def __init__(self, where: str, shards: list[Path], config: DataConfig):
        self.where, self.shards, self.caption_key = where, shards, config.caption_key
        self.most_bytes = most_bytes(config.max_pixels)
        self.bad: list[Bad] = []
        self.members_not_read: NotRead = {}
        for indexed in self._index():
            self.bad += indexed.bad
            add_not_read(self.members_not_read, indexed.not_read)
        self.starts = [0, *accumulate(map(len, self.rows))]  # each shard's first sample
        # Shard -> file descriptor, in order of use.
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        """The state for another process, without memory maps and open files: it opens its own."""
        return {**vars(self), "rows": [], "_open": OrderedDict()}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._index()

    def _index(self) -> list[Indexed]:
        """Map the rows of each shard; returns what else is indexed of each folder."""
        self.rows: list[np.ndarray] = []
        folders = []
        for _, shards in groupby(self.shards, key=lambda shard: shard.parent):
            folders.append(index(list(shards)))
            self.rows += folders[-1].rows
        return folders

    def __len__(self) -> int:
        return self.starts[-1]

    def image(self, index: int) -> bytes:
        shard, row = self._row(index)
        check_bytes(int(row["image_size"]), self.most_bytes)
        return self._bytes(shard, row, "image")

    def captions(self, index: int) -> list[str]:
        shard, row = self._row(index)
        if row["text"] and not self.caption_key:
            try:
                return usable([self._bytes(shard, row, "text").decode().strip()])
            except UnicodeDecodeError:
                raise Refused("its .txt is no UTF-8") from None
        values = self._json(shard, row)
        texts = next((values[key] for key in self._keys if values.get(key)), None)
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refused(f"its .json has no text under {' or '.join(self._keys)}")
        return usable(texts)

    def _keys(self) -> tuple[str, ...]:
        return (self.caption_key,) if self.caption_key else CAPTION_KEYS

    def _json(self, shard: int, row: np.void) -> dict[str, object]:
        """The object in a sample's .json."""
        if not row["json"]:
            raise Refused(f"no .json, and data.caption_key is {self.caption_key!r}")
        try:
            return parse(self._bytes(shard, row, "json"), dict)
        except ValueError as error:
            raise Refused(f"its .json is no JSON ({error})") from None

    def not_read(self) -> list[str]:
        """Members that no sample takes, and keys of the first sample's .json if that is read."""
        lines = []
        for kind, (count, first) in self.members_not_read.items():
            lines.append(f"{count:,} members ({kind}), the first {first}")
        _, row = self._row(0)
        if self.caption_key or not row["text"]:
            with suppress(Refused, OSError):  # it is a bad sample, and reported as that
                values = self._json(0, row)
                used = next((key for key in self._keys if values.get(key)), "")
                lines += unused("the keys of .json", values, (used,))
        return lines

    def name(self, index: int) -> str:
        """The shard's name and the image's name in it."""
        shard, row = self._row(index)
        header = os.pread(self._descriptor(shard), BLOCK, int(row["image"]) - BLOCK)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
        except tarfile.HeaderError:  # the header was damaged after indexing
            member = f"sample {index - self.starts[shard]}"
        return f"{self.shards[shard].name}/{member}"

    def key(self, index: int) -> bytes:
        shard = bisect_right(self.starts, index) - 1
        return f"{shard} {index - self.starts[shard]}".encode()

    def fingerprint(self) -> dict[str, object]:
        base = os.path.commonpath([shard.parent for shard in self.shards])
        sizes = {os.path.relpath(shard, base): shard.stat().st_size for shard in self.shards}
        # A shard is padded: its size often stays where the sizes of its members change.
        members = hashlib.blake2b(digest_size=8)
        for rows in self.rows:
            members.update(rows.tobytes())
        return {
            "pictures": len(self),
            "files": sizes,
            "members": members.hexdigest(),
            "sampled": sampled(self.shards),
        }

    def identities(self) -> np.ndarray:
        places, counts = map(os.path.realpath, self.shards), np.diff(self.starts)
        return np.concatenate([*map(numbered, places, counts.tolist())])

    def caption_counts(self) -> np.ndarray | None:
        """One caption for each .txt; how many a .json holds is not known."""
        if self.caption_key or not all((rows["text"] > 0).all() for rows in self.rows):
            return None
        return np.ones(len(self), dtype=np.int64)

    def caption_bytes(self) -> np.ndarray:
        """The sizes of the .txt and .json: the latter hold the caption and more."""
        sizes = []
        for rows in self.rows:
            as_text = (rows["text"] > 0) & (not self.caption_key)
            sizes.append(np.where(as_text, rows["text_size"], rows["json_size"]).astype(np.int64))
        return np.concatenate(sizes)

    def _row(self, index: int) -> tuple[int, np.void]:
        shard = bisect_right(self.starts, index) - 1
        return shard, self.rows[shard][index - self.starts[shard]]

    def _bytes(self, shard: int, row: np.void, field: str) -> bytes:
        size = int(row[f"{field}_size"])
        if field != "image" and size > MOST_TEXT_BYTES:
            raise Refused(f"{size:,} bytes of text")
        content = os.pread(self._descriptor(shard), size, int(row[field]))
        if len(content) < size:
            raise Refused("truncated since the run began")
        return content

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]
