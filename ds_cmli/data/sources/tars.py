"""WebDataset tars: their index, and reading in any order."""

import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import check_size
from ds_cmli.data.sources import Source
from ds_cmli.errors import UserError, blame
from ds_cmli.files import cache_folder, locked

FIELD_OF_ENDING = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    "txt": "text",
    "json": "json",
}
CAPTION_KEYS = ("caption", "captions", "text")  # of a sample's .json, if it has no .txt
# Where a sample's members are in the shard, and their sizes; 0 of one that it has not.
NAMES = ("image", "image_size", "text", "text_size", "json", "json_size")
ROW = np.dtype([(name, "<u8") for name in NAMES])
NO_ROWS = torch.empty(0, dtype=torch.uint8)
Member = tuple[int, int]  # offset and size in the shard
NO_MEMBER: Member = 0, 0
DIGEST_BYTES = 32  # SHA-256 of an index, at its end
MAX_OPEN = 64  # shards: there may be thousands, and a process may open 1,024 files by default


def open_tars(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open tar shards. Raises `UserError` for one that is no whole tar, or if none has a sample."""
    tars = Tars(files, config.caption_key)
    if not len(tars):
        pair = "one is NAME.jpg (.jpeg, .png, .webp) with NAME.txt or NAME.json"
        raise UserError(f"{files[0]} holds no sample: {pair}")
    return {"train": tars}


class Tars:
    """WebDataset tars, as img2dataset writes them, read in place and in any order.

    A sample is an image and its captions: the .txt, or a key of the .json. No library does that:
    `wids` indexes a shard each time it is opened, `datasets` copies it. Here the index of a shard
    is made once, and kept in the cache.
    """

    def __init__(self, shards: list[Path], caption_key: str = ""):
        self.shards, self.caption_key, self.left_out = shards, caption_key, 0
        self.rows = list[np.ndarray]()
        for rows in indices(shards):
            whole = (rows["image_size"] > 0) & (rows["text_size"] + rows["json_size"] > 0)
            self.rows.append(rows if whole.all() else rows[whole])
            self.left_out += len(rows) - len(self.rows[-1])  # without image or caption
        self.shard_sizes = np.array([len(rows) for rows in self.rows])
        self.starts = [0, *accumulate(self.shard_sizes.tolist())]
        self.open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, by last use

    def __len__(self) -> int:
        return self.starts[-1]

    def image(self, index: int) -> bytes:
        return self._read(index, "image")

    def captions(self, index: int) -> list[str]:
        if not self.caption_key and (text := self._read(index, "text")):
            return [text.decode().strip()]
        values = json.loads(self._read(index, "json") or b"{}")
        keys = [self.caption_key] if self.caption_key else CAPTION_KEYS
        value = next((values[key] for key in keys if values.get(key)), None)
        if value is None:
            raise ValueError(f"its .json has no {' or '.join(keys)}")
        return value if isinstance(value, list) else [value]

    def name(self, index: int) -> str:
        shard, row = self._at(index)
        header_start = int(row["image"]) - tarfile.BLOCKSIZE
        try:
            header = os.pread(self._descriptor(shard), tarfile.BLOCKSIZE, header_start)
        except OSError:  # the shard is gone, and its sample is named in the message about that
            return f"{self.shards[shard].name}, sample {index - self.starts[shard]}"
        member, *_ = header[:100].split(b"\0", 1)
        return f"{self.shards[shard].name}/{member.decode(errors='replace')}"

    def fingerprint(self) -> dict[str, object]:
        return {"images": len(self), "files": {x.name: x.stat().st_size for x in self.shards}}

    def _at(self, index: int) -> tuple[int, np.void]:
        shard = bisect_right(self.starts, index) - 1
        return shard, self.rows[shard][index - self.starts[shard]]

    def _read(self, index: int, field: str) -> bytes:
        shard, row = self._at(index)
        size = int(row[f"{field}_size"])
        check_size(size)
        content = os.pread(self._descriptor(shard), size, int(row[field]))
        if len(content) < size:
            raise ValueError("truncated since the run began")
        return content

    def _descriptor(self, shard: int) -> int:
        if shard not in self.open:
            if len(self.open) == MAX_OPEN:
                os.close(self.open.popitem(last=False)[1])
            self.open[shard] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self.open.move_to_end(shard)
        return self.open[shard]


def indices(shards: list[Path]) -> Iterator[np.ndarray]:
    """Where the samples of each shard are, `ROW` [n], memory-mapped from the cache.

    One process makes what is not there or is damaged, others wait.
    """
    folder, files = cache_folder() / "tar-index", list[Path]()
    for shard in shards:
        status = shard.stat()
        state = f"{os.path.realpath(shard)} {status.st_size} {status.st_mtime_ns}"
        files.append(folder / f"{hashlib.sha256(os.fsencode(state)).hexdigest()[:24]}.rows")
    if not all(map(_is_whole, files)):
        with locked(folder, "lock", "the index of tars"):
            for shard, file in zip(shards, files, strict=True):
                if not _is_whole(file):
                    content, beside = scan(shard).tobytes(), file.with_suffix(".new")
                    beside.write_bytes(content + hashlib.sha256(content).digest())
                    beside.replace(file)
    for file in files:
        size = file.stat().st_size - DIGEST_BYTES
        # By torch, which keeps no descriptor open: there may be thousands of shards.
        rows = torch.from_file(str(file), size=size, dtype=torch.uint8) if size else NO_ROWS
        yield rows.numpy().view(ROW)


def _is_whole(file: Path) -> bool:
    content = file.read_bytes() if file.exists() else b""
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def scan(shard: Path) -> np.ndarray:
    """The samples of a tar, `ROW` [n], in the order of their first members.

    As in WebDataset, members with the same name up to its first dot are a sample. A `UserError`
    names a tar that is compressed, damaged or truncated, which `tarfile` takes for its end.
    """
    samples: list[dict[str, Member]] = []
    last: dict[str, dict[str, Member]] = {}  # the last sample of each name
    files: dict[str, Member] = {}
    links: list[tuple[dict[str, Member], str, str]] = []  # sample, field, and what it links to
    with blame(f"{shard} is no whole, uncompressed tar"):
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                folder, _, base = member.name.rpartition("/")
                target = f"{folder or '.'}/{member.linkname}" if member.issym() else member.linkname
                place = member.offset_data, member.size
                if member.isreg() and not member.issparse():
                    files[member.name] = place
                elif not member.issym() and not member.islnk():
                    continue
                stem, _, ending = base.partition(".")
                field, key = FIELD_OF_ENDING.get(ending.lower()), f"{folder}/{stem}"
                if not stem or not field:
                    continue
                if key not in last or field in last[key]:
                    last[key] = {}
                    samples.append(last[key])
                last[key][field] = place
                if target:
                    links.append((last[key], field, target))
            end = archive.offset
        with open(shard, "rb") as file:
            file.seek(end)
            rest = file.read(2**20)
        if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
            raise ValueError(f"damaged or cut off at byte {end:,}")
    if links:
        files = {os.path.normpath(name): place for name, place in files.items()}
    for sample, field, target in links:
        sample[field] = files.get(os.path.normpath(target), NO_MEMBER)
    fields = NAMES[::2]
    rows = [sum((sample.get(field, NO_MEMBER) for field in fields), ()) for sample in samples]
    return np.array(rows, ROW)
