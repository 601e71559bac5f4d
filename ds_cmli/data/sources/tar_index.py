"""One pass over a tar shard, which finds the byte ranges of each sample's image and caption, and broken samples.

As in WebDataset, a sample consists of the members with the same name up to its first dot. They may be in any order.
"""

import hashlib
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from ds_cmli.common.errors import UserError
from ds_cmli.data.assets import cache_folder
from ds_cmli.data.bad import EMPTY, Bad

IMAGES = ("jpg", "jpeg", "png", "webp")
FIELDS = {**dict.fromkeys(IMAGES, "image"), "txt": "text", "json": "json"}
# For each member of a sample: its offset in the shard and its size in bytes; 0 if the sample has no such member.
ROW = np.dtype(
    [
        (f"{name}{what}", kind)
        for name in ("image", "text", "json")
        for what, kind in (("", "<u8"), ("_size", "<u4"))
    ]
)
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")
BLOCK, RECORD = (
    512,
    10_240,
)  # bytes: the size of a header; an archive is padded to a multiple of a record


def scan(path: Path) -> tuple[np.ndarray, list[Bad]]:
    """The usable samples, `ROW` [n], in the order of their first members, and the samples that cannot be used.

    Raises:
        UserError: the file is not a tar archive, is empty, or is compressed.
    """
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    open_ones: dict[str, dict[str, tuple[int, int]]] = {}
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
            sample = open_ones.get(found[1])
            if sample is None or field in sample:  # a repeated name begins another sample
                sample = open_ones[found[1]] = {}
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


def _defect(sample: dict[str, tuple[int, int]], end: int) -> str | None:
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
    return EMPTY if "json" not in sample and sample["text"][1] == 0 else None


def _members(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo | str]:
    """Yield the members of an archive, and between them a text for each damaged range of bytes.

    `tarfile` takes a damaged header for the end of the archive. Here reading continues at the next valid header, and
    the skipped bytes are checked: only a few zeros may lie between members.
    """
    end = os.fstat(file.fileno()).st_size
    first = file.read(BLOCK)
    if (
        first[:2] == b"\x1f\x8b"
        or first[:3] in (b"BZh", b"\xfd7z")
        or first[:4] == b"\x28\xb5\x2f\xfd"
    ):
        raise UserError(f"{path} is compressed: unpack it to a plain .tar, which is read in place")
    if end == 0:
        raise UserError(f"{path} is empty: fetch it again, or leave it out")
    file.seek(0)
    try:
        if first[257:262] != b"ustar" and not _is_header(first):
            raise tarfile.ReadError
        archive: Any = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115
    except tarfile.TarError:
        raise UserError(f"{path} is no tar archive: fetch it again, or leave it out") from None
    expected, member = 0, _next(archive, end)
    while member is not None:
        damage = _between(file, expected, member.offset)
        if damage:
            yield damage
        yield member
        archive.members.clear()  # `tarfile` would keep all members in memory
        expected = archive.offset
        member = _next(archive, end)
    if expected > end:
        yield f"truncated: ends at byte {end:,} within a member"
    elif end - expected < 2 * BLOCK:
        yield f"truncated: ends at byte {end:,} without the mark of an archive's end"
    else:
        damage = _between(file, expected, end)
        if damage:
            yield damage


def _next(archive: Any, end: int) -> tarfile.TarInfo | None:
    """The next member. A damaged header is passed over by its one block, as its size is not to be trusted."""
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
        if (
            position == start and block[156:157] == b"g" and _is_header(block[:BLOCK])
        ):  # a global header
            return None
        zeros = zeros and not any(block.strip(b"\0"))
    if (
        zeros and stop - start <= 2 * RECORD
    ):  # the end of the archive, or of one of several that were joined
        return None
    return f"damaged between the bytes {start:,} and {stop:,}"


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


VERSION = 1
KEPT_SECONDS = 7 * 86400  # how long the rows of a replaced index are kept
TELL_SECONDS = 30  # time between two lines of progress


def index(shards: list[Path]) -> tuple[Path, list[tuple[int, int]], list[Bad]]:
    """The index of shards, which all lie in one folder; it is built or updated if necessary.

    Returns:
        The file of the rows (.npy of `ROW`), each shard's first row and number of rows in it, and the broken samples.

    Raises:
        UserError: a shard cannot be read, or the cache cannot be written.
    """
    folder = os.path.realpath(shards[0].parent)
    home = cache_folder() / "tar-index"
    name = hashlib.sha256(folder.encode()).hexdigest()[:24]
    table = _fresh(home / f"{name}.json", shards)
    if table is None:
        try:
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / f"{name}.lock"):  # one process builds the index, the others wait
                table = _fresh(home / f"{name}.json", shards) or _make(home, name, shards)
        except (
            OSError,
            NotImplementedError,
        ) as error:  # FileLock raises the latter on file systems without locks
            raise UserError(
                f"the index of {folder} cannot be written to {home} ({getattr(error, 'strerror', None) or error}): "
                "free some space there, or set DS_CMLI_CACHE to another folder"
            ) from None
    own = [table["shards"][shard.name] for shard in shards]
    bad = [(file, reason) for shard in own for file, reason in shard["bad"]]
    return home / table["rows"], [(shard["first"], shard["count"]) for shard in own], bad


def _state(shard: Path) -> list[int]:
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror})") from None
    return [status.st_size, status.st_mtime_ns]


def _read(path: Path) -> dict[str, Any]:
    """Read the table of an index; an empty table if there is no usable index."""
    try:
        table = json.loads(path.read_text())
        rows = np.load(path.parent / table["rows"], mmap_mode="r")
        if table["version"] == VERSION and rows.dtype == ROW and len(rows) == table["count"]:
            return table
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
    ):  # there is no index, or it is damaged
        pass
    return {"shards": {}}


def _fresh(path: Path, shards: list[Path]) -> dict[str, Any] | None:
    """The table if it holds the present state of all shards, else None."""
    table = _read(path)
    known = table["shards"]
    return (
        table
        if all(s.name in known and known[s.name]["state"] == _state(s) for s in shards)
        else None
    )


def _make(home: Path, name: str, shards: list[Path]) -> dict[str, Any]:
    """Scan new and changed shards and write the index; the old index is replaced atomically."""
    old = _read(home / f"{name}.json")
    kept = {
        n: entry for n, entry in old["shards"].items() if _unchanged(shards[0].parent / n, entry)
    }
    new = [shard for shard in shards if shard.name not in kept]
    size = sum(_state(shard)[0] for shard in new)
    print(
        f"indexing {len(new)} tar shards of {shards[0].parent}, {size / 1e9:.2f} GB", flush=True
    )  # one rank does it
    told = time.monotonic()
    before = np.load(home / old["rows"], mmap_mode="r") if kept else None
    entries: dict[str, Any] = {}
    parts, count = [], 0
    for shard in [*kept, *(shard.name for shard in new)]:
        if shard in kept:
            entry = kept[shard]
            rows = before[entry["first"] : entry["first"] + entry["count"]]  # type: ignore[index]
        else:
            path = shards[0].parent / shard
            state = _state(
                path
            )  # taken before the scan, so that a shard that changes meanwhile is scanned again
            try:
                rows, bad = scan(path)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
            if time.monotonic() - told > TELL_SECONDS:
                print(
                    f"indexed {len(entries) - len(kept) + 1} of {len(new)} tar shards", flush=True
                )
                told = time.monotonic()
            entry = {"state": state, "bad": bad}
        entries[shard] = {**entry, "first": count, "count": len(rows)}
        parts.append(rows)
        count += len(rows)
    handle, file = tempfile.mkstemp(prefix=f"{name}-", suffix=".npy", dir=home)
    with open(handle, "wb") as out:
        np.save(out, np.concatenate(parts))
    table = {"version": VERSION, "rows": Path(file).name, "count": count, "shards": entries}
    temporary = home / f"{name}.tmp"
    temporary.write_text(json.dumps(table))
    os.replace(temporary, home / f"{name}.json")
    for former in home.glob(f"{name}-*.npy"):  # a process that just starts may still open one
        if former.name != table["rows"] and time.time() - former.stat().st_mtime > KEPT_SECONDS:
            former.unlink()
    return table


def _unchanged(shard: Path, entry: dict[str, Any]) -> bool:
    return shard.is_file() and entry["state"] == _state(shard)
