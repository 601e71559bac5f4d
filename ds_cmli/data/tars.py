"""WebDataset tars, as img2dataset writes them, read in place and in any order.

No library does that: `wids` indexes a shard again each time it is opened, `datasets` copies it.
Here a shard is indexed once, and the index is kept in the cache.
"""

import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from ds_cmli.common.cache import cache_folder, locked
from ds_cmli.common.errors import UserError, blame
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources import Source

FIELDS = {**dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"), "txt": "text", "json": "json"}
CAPTION_KEYS = ("caption", "captions", "text")  # of a sample's .json, if it has no .txt
# Where a sample's members are in the shard, and their sizes; 0 of one that it has not.
NAMES = ("image", "image_size", "text", "text_size", "json", "json_size")
ROW = np.dtype([(name, "<u8") for name in NAMES])
Place = tuple[int, int] | str  # offset and size in the shard; or the name that a link has
MOST_OPEN = 64  # shards: there may be thousands, and a process may open 1,024 files by default


def open_tars(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open tar shards. Raises `UserError` for one that is no whole tar, or if none has a sample."""
    tars = Tars(files, config.caption_key)
    if not len(tars):
        raise UserError(
            f"{files[0]} holds no sample: one is NAME.jpg (.jpeg, .png, .webp) with NAME.txt or "
            "NAME.json"
        )
    return {"train": tars}


class Tars:
    """Samples of an image and its captions: the .txt, or a key of the .json."""

    def __init__(self, shards: list[Path], caption_key: str = ""):
        self.shards, self.caption_key = shards, caption_key
        self.rows, self.left_out = list[np.ndarray](), 0  # the latter without image or caption
        for rows in map(index, shards):
            whole = (rows["image_size"] > 0) & (rows["text_size"] + rows["json_size"] > 0)
            self.rows.append(rows if whole.all() else rows[whole])
            self.left_out += len(rows) - len(self.rows[-1])
        self.starts = [0, *accumulate(map(len, self.rows))]
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
        header = os.pread(self._descriptor(shard), tarfile.BLOCKSIZE, int(row["image"]) - 512)
        member = header[:100].split(b"\0", 1)[0].decode(errors="replace")
        return f"{self.shards[shard].name}/{member}"

    def fingerprint(self) -> dict[str, object]:
        sizes = {shard.name: shard.stat().st_size for shard in self.shards}
        return {"images": len(self), "files": sizes}

    def _at(self, index: int) -> tuple[int, np.void]:
        shard = bisect_right(self.starts, index) - 1
        return shard, self.rows[shard][index - self.starts[shard]]

    def _read(self, index: int, field: str) -> bytes:
        shard, row = self._at(index)
        size = int(row[f"{field}_size"])
        content = os.pread(self._descriptor(shard), size, int(row[field]))
        if len(content) < size:
            raise ValueError("truncated since the run began")
        return content

    def _descriptor(self, shard: int) -> int:
        if shard not in self.open:
            if len(self.open) == MOST_OPEN:
                os.close(self.open.popitem(last=False)[1])
            self.open[shard] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self.open.move_to_end(shard)
        return self.open[shard]


def index(shard: Path) -> np.ndarray:
    """Where a shard's samples are, `ROW` [n], memory-mapped from the cache.

    One process makes it, others wait.
    """
    status, folder = shard.stat(), cache_folder() / "tar-index"
    state = f"{os.path.realpath(shard)} {status.st_size} {status.st_mtime_ns}"
    name = hashlib.sha256(os.fsencode(state)).hexdigest()[:24]
    file = folder / f"{name}.npy"
    if not file.exists():
        with locked(folder, f"{name}.lock", f"the index of {shard}"):
            if not file.exists():
                np.save(beside := folder / f"{name}.new.npy", scan(shard))
                beside.replace(file)
    rows = np.load(file, mmap_mode="r")
    # Mapped by torch, which keeps no descriptor open: there may be thousands of shards.
    whole = torch.from_file(str(file), size=rows.offset + rows.nbytes, dtype=torch.uint8)
    return whole.numpy()[rows.offset :].view(ROW)


def scan(shard: Path) -> np.ndarray:
    """The samples of a tar, `ROW` [n], in the order of their first members.

    As in WebDataset, members with the same name up to its first dot are a sample. A `UserError`
    names a tar that is compressed, damaged or truncated, which `tarfile` takes for its end.
    """
    samples: list[dict[str, Place]] = []
    last: dict[str, dict[str, Place]] = {}  # the last sample of each name
    files: dict[str, tuple[int, int]] = {}
    with blame(f"{shard} is no whole, uncompressed tar"):
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                place: Place = member.offset_data, member.size
                if member.islnk() or member.issym():
                    folder = os.path.dirname(member.name) if member.issym() else ""
                    place = os.path.normpath(os.path.join(folder, member.linkname))
                elif member.isreg() and not member.issparse():
                    files[os.path.normpath(member.name)] = member.offset_data, member.size
                else:
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if stem and (field := FIELDS.get(ending.lower())):
                    key = f"{folder}/{stem}"
                    if key not in last or field in last[key]:
                        last[key] = {}
                        samples.append(last[key])
                    last[key][field] = place
            end = archive.offset
        with open(shard, "rb") as file:
            file.seek(end)
            rest = file.read(2**20)
        if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
            raise ValueError(f"damaged or cut off at byte {end:,}")
    rows = np.zeros(len(samples), ROW)
    for row, sample in zip(rows, samples, strict=True):
        for field, place in sample.items():
            start_size = files.get(place, (0, 0)) if isinstance(place, str) else place
            row[field], row[f"{field}_size"] = start_size
    return rows
