"""The index of tar shards: built once, kept in the cache, and shared as a memory-mapped file.

There is one index per folder. It holds the rows of all shards of that folder that were ever
requested; a shard is indexed again if its size or modification time has changed. As in WebDataset,
a sample consists of the members with the same name up to its first dot. They may be in any order.
"""

import hashlib
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypedDict, cast

import numpy as np

from ds_cmli.common.cache import cache_folder, locked
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import parse
from ds_cmli.data.bad import EMPTY, Bad

VERSION = 1
KEPT_SECONDS = 7 * 86400  # how long the rows of a replaced index are kept
TELL_SECONDS = 30  # time between two lines of progress

IMAGES = ("jpg", "jpeg", "png", "webp")
FIELDS = {**dict.fromkeys(IMAGES, "image"), "txt": "text", "json": "json"}
# The offset in the shard and the size in bytes of each member of a sample; 0 if it has none.
ROW = np.dtype(
    [
        ("image", "<u8"),
        ("image_size", "<u4"),
        ("text", "<u8"),
        ("text_size", "<u4"),
        ("json", "<u8"),
        ("json_size", "<u4"),
    ]
)
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")
BLOCK = 512  # bytes of a header
RECORD = 10_240  # bytes: an archive is padded to a multiple
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7z", b"\x28\xb5\x2f\xfd")  # first bytes


Members = dict[str, tuple[int, int]]  # by field: offset in the shard and size in bytes


class Shard(TypedDict):
    """What an index holds of a shard."""

    state: list[int]  # size and modification time, in ns
    bad: list[Bad]  # its samples that cannot be used
    first: int  # its first row
    count: int  # its number of rows


class Index(TypedDict):
    """The JSON of an index."""

    version: int
    rows: str  # the file of the rows
    count: int  # the number of all rows
    shards: dict[str, Shard]


class Indexed(NamedTuple):
    rows: Path  # an .npy file of `ROW`
    spans: list[tuple[int, int]]  # each shard's first row and number of rows in it
    bad: list[Bad]  # the samples that cannot be used


def index(shards: list[Path]) -> Indexed:
    """The index of shards, which all lie in one folder; it is built or updated if necessary.

    Raises:
        UserError: a shard cannot be read, or the cache cannot be written.
    """
    folder = os.path.realpath(shards[0].parent)
    home = cache_folder() / "tar-index"
    name = hashlib.sha256(folder.encode()).hexdigest()[:24]
    table = _fresh(home / f"{name}.json", shards)
    if table is None:
        with locked(home, f"{name}.lock", f"the index of {folder}"):
            table = _fresh(home / f"{name}.json", shards) or _make(home, name, shards)
    found = Indexed(home / table["rows"], [], [])
    for shard in shards:
        entry = table["shards"][shard.name]
        found.spans.append((entry["first"], entry["count"]))
        found.bad.extend((file, reason) for file, reason in entry["bad"])  # JSON gives lists
    return found


def _state(shard: Path) -> list[int]:
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror})") from None
    return [status.st_size, status.st_mtime_ns]


def _read(path: Path) -> Index:
    """Read the table of an index; an empty table if there is no usable index."""
    with suppress(OSError, EOFError, ValueError, KeyError, TypeError):
        table = cast(Index, parse(path.read_bytes(), dict))
        rows = np.load(path.parent / table["rows"], mmap_mode="r")
        if table["version"] == VERSION and rows.dtype == ROW and len(rows) == table["count"]:
            return table
    return Index(version=VERSION, rows="", count=0, shards={})


def _fresh(path: Path, shards: list[Path]) -> Index | None:
    """The table if it holds the present state of all shards, else None."""
    table = _read(path)
    for shard in shards:
        entry = table["shards"].get(shard.name)
        if entry is None or entry["state"] != _state(shard):
            return None
    return table


def _make(home: Path, name: str, shards: list[Path]) -> Index:
    """Scan new and changed shards and write the index; the old index is replaced atomically."""
    old = _read(home / f"{name}.json")
    folder = shards[0].parent
    entries: dict[str, Shard] = {}
    parts: dict[str, np.ndarray] = {}
    before = np.load(home / old["rows"], mmap_mode="r") if old["shards"] else np.zeros(0, ROW)
    for shard, entry in old["shards"].items():
        path = folder / shard
        if path.is_file() and entry["state"] == _state(path):
            entries[shard] = entry
            parts[shard] = before[entry["first"] : entry["first"] + entry["count"]]
    new = [shard for shard in shards if shard.name not in entries]
    size = sum(_state(shard)[0] for shard in new)
    # One rank does it.
    print(f"indexing {len(new)} tar shards of {folder}, {size / 1e9:.2f} GB", flush=True)
    told = time.monotonic()
    for number, path in enumerate(new, 1):
        # Taken before the scan, so that a shard that changes meanwhile is scanned again.
        state = _state(path)
        try:
            rows, bad = scan(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
        if time.monotonic() - told > TELL_SECONDS:
            print(f"indexed {number} of {len(new)} tar shards", flush=True)
            told = time.monotonic()
        entries[path.name] = Shard(state=state, bad=bad, first=0, count=len(rows))
        parts[path.name] = rows
    count = 0
    for shard, rows in parts.items():
        entries[shard]["first"] = count
        count += len(rows)
    handle, file = tempfile.mkstemp(prefix=f"{name}-", suffix=".npy", dir=home)
    with open(handle, "wb") as out:
        np.save(out, np.concatenate(list(parts.values())))
    table = Index(version=VERSION, rows=Path(file).name, count=count, shards=entries)
    temporary = home / f"{name}.tmp"
    temporary.write_text(json.dumps(table))
    os.replace(temporary, home / f"{name}.json")
    for former in home.glob(f"{name}-*.npy"):  # a process that just starts may still open one
        if former.name != table["rows"] and time.time() - former.stat().st_mtime > KEPT_SECONDS:
            former.unlink()
    return table


def scan(path: Path) -> tuple[np.ndarray, list[Bad]]:
    """The usable samples, `ROW` [n], in the order of their first members, and the others.

    Raises:
        UserError: the file is not a tar archive, is empty, or is compressed.
    """
    samples: list[tuple[str, Members]] = []
    last: dict[str, Members] = {}  # the last sample of each name
    bad: list[Bad] = []
    with open(path, "rb") as file:
        for member in _members(file, path):
            if isinstance(member, str):
                bad.append((path.name, member))
                continue
            found = KEY.fullmatch(member.name)
            field = FIELDS.get(found[2].lower()) if found and member.isreg() else None
            if found is None or field is None:
                continue
            sample = last.get(found[1])
            if sample is None or field in sample:  # a repeated name begins another sample
                sample = last[found[1]] = {}
                samples.append((found[1], sample))
            sample[field] = member.offset_data, member.size
        end = os.fstat(file.fileno()).st_size
    rows = np.zeros(len(samples), dtype=ROW)
    good = 0
    for name, sample in samples:
        reason = _defect(sample, end)
        if reason:
            printable = name.encode(errors="replace").decode()
            bad.append((f"{path.name}/{printable}", reason))
            continue
        for field, (start, size) in sample.items():
            rows[good][field], rows[good][f"{field}_size"] = start, size
        good += 1
    return rows[:good].copy(), bad


def _defect(sample: Members, end: int) -> str | None:
    if "image" not in sample:
        return "no image"
    if "text" not in sample and "json" not in sample:
        return "no caption (.txt or .json)"
    if any(start + size > end for start, size in sample.values()):
        return "truncated"
    if any(size >= 2**32 for _, size in sample.values()):
        return "4 GiB or more"
    if sample["image"][1] == 0:
        return "empty image"
    if "json" not in sample and sample["text"][1] == 0:
        return EMPTY
    return None


def _members(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo | str]:
    """Yield the members of an archive, and between them a text for each damaged range of bytes.

    `tarfile` takes a damaged header for the end of the archive. Here reading continues at the next
    valid header, and the skipped bytes are checked: only a few zeros may lie between members.
    """
    end = os.fstat(file.fileno()).st_size
    first = file.read(BLOCK)
    if first.startswith(COMPRESSED):
        raise UserError(f"{path} is compressed: unpack it to a plain .tar, which is read in place")
    if end == 0:
        raise UserError(f"{path} is empty: fetch it again, or leave it out")
    file.seek(0)
    try:
        if first[257:262] != b"ustar" and not _is_header(first):
            raise tarfile.ReadError
        archive = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115
    except tarfile.TarError:
        raise UserError(f"{path} is no tar archive: fetch it again, or leave it out") from None
    expected, member = 0, _next(archive, end)
    while member is not None:
        damage = _between(file, expected, member.offset)
        if damage:
            yield damage
        yield member
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep all members in memory
        expected = archive.offset
        member = _next(archive, end)
    if expected > end:
        damage = f"truncated: ends at byte {end:,} within a member"
    elif end - expected < 2 * BLOCK:
        damage = f"truncated: ends at byte {end:,} without the mark of an archive's end"
    else:
        damage = _between(file, expected, end)
    if damage:
        yield damage


def _next(archive: tarfile.TarFile, end: int) -> tarfile.TarInfo | None:
    """The next member.

    A damaged header is passed over by its one block, as its size is not to be trusted.
    """
    while True:
        start = archive.offset
        try:
            member = archive.next()
            if member is None or (member.size >= 0 and archive.offset > member.offset):
                return member
            start = member.offset  # a negative size led back
        except Exception:  # `tarfile` raises nearly anything for damaged sizes and records
            if start >= end:
                return None
        archive.offset = start + BLOCK


def _between(file: BinaryIO, start: int, stop: int) -> str | None:
    """What is wrong with the bytes between two members; None if nothing is."""
    if start >= stop:
        return None
    zeros = True
    file.seek(start)
    for position in range(start, stop, 2**20):
        block = file.read(min(2**20, stop - position))
        if position == start and block[156:157] == b"g" and _is_header(block[:BLOCK]):
            return None  # a global header
        zeros = zeros and not any(block.strip(b"\0"))
    # Zeros are the end of the archive, or of one of several that were joined.
    if zeros and stop - start <= 2 * RECORD:
        return None
    return f"damaged between the bytes {start:,} and {stop:,}"


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
