"""WebDataset tars, read in place and in any order."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import check_size
from ds_cmli.data.sources import Caption, Source, captions_by_column
from ds_cmli.data.sources.tar_index import BLOCK_BYTES, index_shards, map_rows, mend_index
from ds_cmli.errors import UserError

CAPTION_KEYS = ("caption", "captions", "text")  # of a sample's .json, if it has no .txt
MAX_OPEN = 64  # shards: there may be thousands, and a process may open 1,024 files by default


def open_tars(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open tar shards. Raises `UserError` for one that is no whole tar, or if none has a sample."""
    tars = Tars(files, config)
    if not len(tars):
        pair = "one is NAME.jpg (.jpeg, .png, .webp) with NAME.txt or NAME.json"
        raise UserError(f"{files[0]} holds no sample: {pair}")
    return {"train": tars}


class Shards:
    """Samples in WebDataset tars of known numbers of samples; a subclass opens and names them.

    A sample is an image and its captions: the .txt, or a key of the .json. No library reads them in
    any order: `wids` indexes a shard each time it is opened, `datasets` copies it.
    """

    left_out = 0

    def __init__(self, num_samples: list[int], config: DataConfig):
        self.config = config
        self.shard_sizes = np.array(num_samples, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        # Shard -> what `open_shard` returned, by last use.
        self.opened = OrderedDict[int, tuple[int, np.ndarray]]()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def image(self, index: int) -> bytes:
        return self._read(index, "image")

    def captions(self, index: int) -> Sequence[Caption]:
        key = self.config.caption_key
        weights = self.config.caption_weights
        if not (key or weights) and (text := self._read(index, "text")):
            return [text.decode().strip()]
        values = json.loads(self._read(index, "json") or b"{}")
        if weights:
            return captions_by_column(values, weights)
        keys = [key] if key else CAPTION_KEYS
        value = next((values[key] for key in keys if values.get(key)), None)
        if value is None:
            raise ValueError(f"its .json has no {' or '.join(keys)}")
        return value if isinstance(value, list) else [value]

    @property
    def columns(self) -> list[str]:
        """The keys of the first sample's .json."""
        return list(json.loads(self._read(0, "json") or b"{}"))

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of an image's shard, and the image's number in it."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def open_shard(self, shard: int) -> tuple[int, np.ndarray]:
        """Return a descriptor of a shard, and the rows of its index."""
        raise NotImplementedError

    def find_row(self, index: int) -> tuple[int, np.void]:
        """Return the descriptor of an image's shard, opened if it is not, and the image's row."""
        shard, number = self.place(index)
        if shard not in self.opened:
            if len(self.opened) == MAX_OPEN:
                _, (descriptor, _) = self.opened.popitem(last=False)
                os.close(descriptor)
            self.opened[shard] = self.open_shard(shard)
        self.opened.move_to_end(shard)
        descriptor, rows = self.opened[shard]
        if number >= len(rows):
            count = self.shard_sizes[shard]
            raise ValueError(f"the shard has {len(rows):,} samples and not {count:,}")
        return descriptor, rows[number]

    def _read(self, index: int, field: str) -> bytes:
        descriptor, row = self.find_row(index)
        size = int(row[f"{field}_size"])
        check_size(size)
        content = os.pread(descriptor, size, int(row[field]) * BLOCK_BYTES)
        if len(content) < size:
            raise ValueError("truncated since the run began")
        return content


class Tars(Shards):
    """Local tars, as img2dataset writes them, read in place."""

    def __init__(self, shards: list[Path], config: DataConfig):
        self.shards = shards
        self.indices = index_shards(shards)
        super().__init__([index.num_samples for index in self.indices], config)
        self.left_out = sum(index.left_out for index in self.indices)
        self.checked = set[int]()  # shards whose index this process has read

    def name(self, index: int) -> str:
        shard, number = self.place(index)
        file = self.shards[shard].name
        try:
            descriptor, row = self.find_row(index)
            header = os.pread(descriptor, BLOCK_BYTES, (int(row["image"]) - 1) * BLOCK_BYTES)
        except (OSError, ValueError):  # the shard is gone, and a message about that names it
            return f"{file}, sample {number}"
        member, *_ = header[:100].split(b"\0", 1)
        return f"{file}/{member.decode(errors='replace')}"

    def fingerprint(self) -> dict[str, object]:
        digests = b"".join(index.digest for index in self.indices)
        return {
            "images": len(self),
            "files": {shard.name: shard.stat().st_size for shard in self.shards},
            "index": hashlib.sha256(digests).hexdigest()[:32],
        }

    def open_shard(self, shard: int) -> tuple[int, np.ndarray]:
        index = self.indices[shard]
        if shard not in self.checked:  # once: the full order opens a shard for nearly each image
            mend_index(index, self.shards[shard])
            self.checked.add(shard)
        return os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC), map_rows(index)
