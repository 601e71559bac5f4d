"""The index of tar shards: built once, kept in the cache, and shared as a memory-mapped file.

There is one index per folder, a line of JSON and the rows of all shards of that folder that were
ever requested; a shard is indexed again if it has changed. Damage is found by the file's digest.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from ds_cmli.common.cache import DIGEST_BYTES, cache_folder, is_sealed, locked, seal
from ds_cmli.common.errors import UserError
from ds_cmli.data.bad import Bad
from ds_cmli.data.sources.tar_members import BLOCK, ROW, NotRead, scan

VERSION = 3
TELL_SECONDS = 30  # time between two lines of progress


class Shard(TypedDict):
    """What an index holds of a shard."""

    state: list[int]  # size and modification time, in ns
    changed: int  # the time of its inode's last change, in ns
    headers: str  # the digest of its members' headers
    bad: list[Bad]  # its samples that cannot be used
    not_read: NotRead
    first: int  # its first row
    count: int  # its number of rows


class Indexed(NamedTuple):
    rows: list[np.ndarray]  # `ROW` [n] of each shard, memory-mapped
    bad: list[Bad]  # the samples that cannot be used
    not_read: NotRead


def index(shards: list[Path]) -> Indexed:
    """The index of shards, which all lie in one folder; it is built or updated if necessary.

    Raises:
        UserError: a shard cannot be read, or the cache cannot be written.
    """
    folder = os.path.realpath(shards[0].parent)
    home = cache_folder() / "tar-index"
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]
    path = home / f"{name}.index"
    entries, rows = _read(path)
    if not _is_fresh(entries, rows, shards):
        with locked(home, f"{name}.lock", f"the index of {folder}"):
            if not _is_fresh(*_read(path), shards):
                _make(path, shards)
        entries, rows = _read(path)
    indexed = Indexed([], [], {})
    for shard in shards:
        entry = entries[shard.name]
        indexed.rows.append(_own(entry, rows))
        indexed.bad.extend((file, reason) for file, reason in entry["bad"])  # JSON gives lists
        add_not_read(indexed.not_read, entry["not_read"])
    return indexed


def add_not_read(total: NotRead, more: NotRead) -> None:
    """Add the counts of some shards to those of others."""
    for kind, (count, first) in more.items():
        before, name = total.get(kind, (0, first))
        total[kind] = before + count, name


def _status(shard: Path) -> os.stat_result:
    try:
        return shard.stat()
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror})") from None


def _read(path: Path) -> tuple[dict[str, Shard], np.ndarray]:
    """Read an index and its rows, `ROW` [n]; both are empty if it is damaged."""
    if is_sealed(path):
        with open(path, "rb") as file:
            table = json.loads(file.readline())
            start = file.tell()
            count = (file.seek(0, os.SEEK_END) - DIGEST_BYTES - start) // ROW.itemsize
            rows = np.zeros(0, ROW)
            if count:
                rows = np.memmap(file, ROW, "r", start, (count,))
            if table["version"] == VERSION:
                return table["shards"], rows
    return {}, np.zeros(0, ROW)


def _own(entry: Shard, rows: np.ndarray) -> np.ndarray:
    """The rows of a shard."""
    return rows[entry["first"] : entry["first"] + entry["count"]]


def _is_fresh(entries: dict[str, Shard], rows: np.ndarray, shards: list[Path]) -> bool:
    """Whether an index holds the present state of all shards."""
    for shard in shards:
        entry = entries.get(shard.name)
        if entry is None or not _is_present(shard, entry, rows):
            return False
    return True


def _is_present(shard: Path, entry: Shard, rows: np.ndarray) -> bool:
    """Whether a shard is still as it was indexed.

    A copy of it has the time of its modification, and so can have another shard put in its place:
    the time of the last change of its inode tells them apart, or else the headers.
    """
    status = _status(shard)
    if entry["state"] != [status.st_size, status.st_mtime_ns]:
        return False
    if entry["changed"] == status.st_ctime_ns:
        return True
    return entry["headers"] == _headers(shard, _own(entry, rows))


def _headers(shard: Path, rows: np.ndarray) -> str:
    """The digest of the headers of the members that rows, `ROW` [n], name."""
    digest = hashlib.blake2b(digest_size=16)
    with open(shard, "rb") as file:
        for start in (
            np.stack([rows["image"], rows["text"], rows["json"]], axis=1).reshape(-1).tolist()
        ):
            if start:
                digest.update(os.pread(file.fileno(), BLOCK, start - BLOCK))
    return digest.hexdigest()


def _make(index: Path, shards: list[Path]) -> None:
    """Scan new and changed shards and write the index; the old index is replaced atomically."""
    old, before = _read(index)
    folder = shards[0].parent
    entries: dict[str, Shard] = {}
    parts: dict[str, np.ndarray] = {}
    for shard, entry in old.items():
        path = folder / shard
        if path.is_file() and _is_present(path, entry, before):
            entries[shard] = entry
            parts[shard] = _own(entry, before)
    new = [shard for shard in shards if shard.name not in entries]
    size = sum(_status(shard).st_size for shard in new)
    # One rank does it.
    print(f"indexing {len(new)} tar shards of {folder}, {size / 1e9:.2f} GB", flush=True)
    last_line = time.monotonic()
    for number, path in enumerate(new, 1):
        # Taken before the scan, so that a shard that changes meanwhile is scanned again.
        status = _status(path)
        try:
            rows, bad, not_read = scan(path)
            headers = _headers(path, rows)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
        if time.monotonic() - last_line > TELL_SECONDS:
            print(f"indexed {number} of {len(new)} tar shards", flush=True)
            last_line = time.monotonic()
        entries[path.name] = Shard(
            state=[status.st_size, status.st_mtime_ns],
            changed=status.st_ctime_ns,
            headers=headers,
            bad=bad,
            not_read=not_read,
            first=0,
            count=len(rows),
        )
        parts[path.name] = rows
    count = 0
    for shard, rows in parts.items():
        entries[shard]["first"] = count
        count += len(rows)
    temporary = index.with_suffix(".tmp")
    with open(temporary, "wb") as out:
        out.write(json.dumps({"version": VERSION, "shards": entries}).encode() + b"\n")
        for rows in parts.values():
            out.write(rows.tobytes())
    seal(temporary)
    os.replace(temporary, index)
