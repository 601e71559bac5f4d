"""WebDataset tars, read in place and in any order."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import check_size
from ds_cmli.data.sources import MAX_FULL, Caption, Source, captions_by_column
from ds_cmli.data.sources.tar_index import BLOCK_BYTES, index_shards, join_rows, read_rows
from ds_cmli.errors import UserError

CAPTION_KEYS = ("caption", "captions", "text")  # of a sample's .json, if it has no .txt
MAX_OPEN = 64  # shards: there may be thousands, and a process may open 1,024 files by default


def open_tars(
    files: list[Path], config: DataConfig, heartbeat: Callable[[], None] = lambda: None
) -> dict[str, Source]:
    """Open tar shards. Raises `UserError` for one that is no whole tar, or if none has a sample."""
    tars = Tars(files, config.caption_key, heartbeat, config.caption_weights or ())
    if not len(tars):
        pair = "one is NAME.jpg (.jpeg, .png, .webp) with NAME.txt or NAME.json"
        raise UserError(f"{files[0]} holds no sample: {pair}")
    return {"train": tars}


class Tars:
    """WebDataset tars, as img2dataset writes them.

    A sample is an image and its captions: the .txt, or a key of the .json. No library reads them in
    any order: `wids` indexes a shard each time it is opened, `datasets` copies it.
    """

    def __init__(
        self,
        shards: list[Path],
        caption_key: str = "",
        heartbeat: Callable[[], None] = lambda: None,
        weighted_keys: Collection[str] = (),
    ):
        self.shards = shards
        self.caption_key = caption_key
        self.weighted_keys = weighted_keys
        self.indices = index_shards(shards, heartbeat)
        self.left_out = sum(index.left_out for index in self.indices)
        self.shard_sizes = np.array([index.num_samples for index in self.indices], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.joined_rows: np.ndarray | None = None
        if len(self) <= MAX_FULL:
            self.joined_rows = join_rows(self.indices, shards)
        self.open = OrderedDict[int, int]()  # shard -> descriptor, by last use
        self.open_rows: dict[int, np.ndarray] = {}  # of open shards, if none are joined

    def __len__(self) -> int:
        return int(self.starts[-1])

    def image(self, index: int) -> bytes:
        return self._read(index, "image")

    def captions(self, index: int) -> Sequence[Caption]:
        if self.weighted_keys:
            values = json.loads(self._read(index, "json") or b"{}")
            return captions_by_column(values, self.weighted_keys)
        if not self.caption_key and (text := self._read(index, "text")):
            return [text.decode().strip()]
        values = json.loads(self._read(index, "json") or b"{}")
        keys = [self.caption_key] if self.caption_key else CAPTION_KEYS
        value = next((values[key] for key in keys if values.get(key)), None)
        if value is None:
            raise ValueError(f"its .json has no {' or '.join(keys)}")
        return value if isinstance(value, list) else [value]

    def name(self, index: int) -> str:
        shard = self._shard_of(index)
        file = self.shards[shard].name
        try:
            _, row = self._at(index)
            header_start = (int(row["image"]) - 1) * BLOCK_BYTES
            header = os.pread(self._descriptor(shard), BLOCK_BYTES, header_start)
        except (OSError, ValueError):  # the shard is gone, and a message about that names it
            return f"{file}, sample {index - int(self.starts[shard])}"
        member, *_ = header[:100].split(b"\0", 1)
        return f"{file}/{member.decode(errors='replace')}"

    def fingerprint(self) -> dict[str, object]:
        digests = b"".join(index.digest for index in self.indices)
        return {
            "images": len(self),
            "files": {shard.name: shard.stat().st_size for shard in self.shards},
            "index": hashlib.sha256(digests).hexdigest()[:32],
        }

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _at(self, index: int) -> tuple[int, np.void]:
        """Return the number of an image's shard, and its row."""
        shard = self._shard_of(index)
        if self.joined_rows is not None:
            return shard, self.joined_rows[index]
        self._descriptor(shard)
        return shard, self.open_rows[shard][index - int(self.starts[shard])]

    def _read(self, index: int, field: str) -> bytes:
        shard, row = self._at(index)
        size = int(row[f"{field}_size"])
        check_size(size)
        content = os.pread(self._descriptor(shard), size, int(row[field]) * BLOCK_BYTES)
        if len(content) < size:
            raise ValueError("truncated since the run began")
        return content

    def _descriptor(self, shard: int) -> int:
        """Return the descriptor of a shard, opened if it is not; the index comes with it."""
        if shard not in self.open:
            if len(self.open) == MAX_OPEN:
                closed, descriptor = self.open.popitem(last=False)
                os.close(descriptor)
                self.open_rows.pop(closed, None)
            self.open[shard], rows = self._open(shard)
            if rows is not None:
                self.open_rows[shard] = rows
        self.open.move_to_end(shard)
        return self.open[shard]

    def _open(self, shard: int) -> tuple[int, np.ndarray | None]:
        """Return the descriptor of a shard, and its rows unless those of all are joined."""
        rows = read_rows(self.indices[shard]) if self.joined_rows is None else None
        return os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC), rows
