"""The index of tar shards: built once, kept in the cache, and shared by all processes as a memory-mapped file.

There is one index per folder. It holds the rows of all shards of that folder that were ever requested; a shard is
indexed again if its size or modification time has changed.
"""

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ds_cmli.common.errors import UserError
from ds_cmli.data.assets import cache_folder
from ds_cmli.data.bad import Bad
from ds_cmli.data.sources.tar_scan import ROW, scan

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
