"""The index of tar shards: where the samples of each are, found once and kept in the cache.

A shard's index is a file of rows and a footer. All ranks and threads make those that are missing;
each is kept as soon as it is made. A start reads the footers alone.
"""

import hashlib
import os
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ds_cmli.commands import print_line
from ds_cmli.errors import blame
from ds_cmli.files import cache_folder, locked

FIELDS = ("image", "text", "json")
FIELD_OF_ENDING = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    "txt": "text",
    "json": "json",
}
BLOCK_BYTES = tarfile.BLOCKSIZE
# A field has the number of the block at which its member's content begins, and its bytes. Both are
# 0 if the sample has no such member.
ROW = np.dtype([(name, "<u4") for field in FIELDS for name in (field, f"{field}_size")])
NUM_COLUMNS = 2 * len(FIELDS)
MAX_U4 = 2**32 - 1
MAGIC = b"cmli-ix2"
SET_CACHE = "free some space, or set DS_CMLI_CACHE"
FOOTER = struct.Struct("<8sQ16s")  # magic, samples left out, BLAKE2b of the rows
READ_BYTES = 8192  # at a header: what follows a small member is read with it
CHECKSUM = slice(148, 156)  # its field in a header
NUM_THREADS = 8  # of a rank
SECONDS_OF_WAITING = 1.0
SECONDS_OF_LINE = 10.0  # from one line about progress to the next


class Member(NamedTuple):
    """A member of a tar: a file, or a link to one."""

    name: str
    block: int
    num_bytes: int
    target: str  # of a link; "" of a file


class ShardIndex(NamedTuple):
    """The content of an index's footer."""

    file: Path
    num_samples: int  # with an image and captions
    left_out: int  # without image or captions
    digest: bytes  # BLAKE2b of the rows


def index_shards(
    shards: Sequence[Path], heartbeat: Callable[[], None] = lambda: None
) -> list[ShardIndex]:
    """Return the index of each shard, made if it is not in the cache.

    Each rank of a run makes an equal part of what is missing, then helps the others. Ranks do not
    talk, because nodes may or may not share a cache: a rank skips what it finds made.

    Args:
        heartbeat: called each second while indices are made.

    Raises `UserError` for a shard that is compressed, damaged or cut off.
    """
    files = [index_file(shard) for shard in shards]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        indices = list(pool.map(read_footer, files))
    missing = [number for number, index in enumerate(indices) if index is None]
    if missing:
        with blame(f"the index of tars cannot be written: {SET_CACHE}"):
            files[0].parent.mkdir(parents=True, exist_ok=True)
        made = _make_missing([shards[n] for n in missing], [files[n] for n in missing], heartbeat)
        for number, index in zip(missing, made, strict=True):
            indices[number] = index
    return [index for index in indices if index is not None]


def index_file(shard: Path) -> Path:
    """Return the path of a shard's index: another one if the shard's path, size or date changes."""
    status = shard.stat()
    state = f"{os.path.realpath(shard)} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(os.fsencode(state)).hexdigest()
    return cache_folder() / "tar-index" / f"{digest[:24]}.index"


def read_footer(file: Path) -> ShardIndex | None:
    """Return what the footer of an index says; None if it is missing or cut off."""
    try:
        with open(file, "rb", buffering=0) as opened:
            row_bytes = os.fstat(opened.fileno()).st_size - FOOTER.size
            content = os.pread(opened.fileno(), FOOTER.size, max(0, row_bytes))
    except OSError:
        return None
    if row_bytes < 0 or row_bytes % ROW.itemsize or not content.startswith(MAGIC):
        return None
    _, left_out, digest = FOOTER.unpack(content)
    return ShardIndex(file, row_bytes // ROW.itemsize, left_out, digest)


def read_rows(index: ShardIndex) -> np.ndarray:
    """Return the rows of an index, `ROW` [n]. Raises ValueError if they are damaged."""
    rows = np.fromfile(index.file, ROW, index.num_samples)
    if _digest(rows) != index.digest:
        raise ValueError(f"the index {index.file} is damaged: delete it")
    return rows


def save_index(rows: np.ndarray, file: Path) -> ShardIndex:
    """Write and return the index of a shard, whose rows are as `scan` returns them."""
    is_whole = (rows["image_size"] > 0) & ((rows["text_size"] > 0) | (rows["json_size"] > 0))
    whole_rows = rows[is_whole]
    index = ShardIndex(file, len(whole_rows), len(rows) - len(whole_rows), _digest(whole_rows))
    with blame(f"the index of tars cannot be written to {file.parent}: {SET_CACHE}"):
        # Two ranks may make one index: each writes a file of its own, and both are equal.
        beside = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.new")
        footer = FOOTER.pack(MAGIC, index.left_out, index.digest)
        beside.write_bytes(whole_rows.tobytes() + footer)
        beside.replace(file)
    return index


def join_rows(indices: Sequence[ShardIndex], shards: Sequence[Path]) -> np.ndarray:
    """Return the rows of all shards, `ROW` [N], in one array that all processes of a node share.

    It is memory-mapped from one file of the cache. One map for each shard would be more than a
    process may have.
    """
    name = hashlib.sha256(b"".join(index.file.name.encode() for index in indices)).hexdigest()[:24]
    file = indices[0].file.with_name(f"{name}.joined")
    num_samples = sum(index.num_samples for index in indices)
    num_bytes = num_samples * ROW.itemsize
    if not num_samples:
        return np.empty(0, ROW)
    if not file.exists() or file.stat().st_size != num_bytes:
        with locked(file.parent, "lock", "the index of tars"):
            beside = file.with_suffix(".new")
            with open(beside, "wb") as joined:
                for index, shard in zip(indices, shards, strict=True):
                    try:
                        rows = read_rows(index)
                    except ValueError:
                        rows = read_rows(save_index(scan(shard), index.file))
                    joined.write(rows.tobytes())
            beside.replace(file)
    return np.memmap(file, ROW, mode="r")


def _digest(rows: np.ndarray) -> bytes:
    return hashlib.blake2b(rows.tobytes(), digest_size=16).digest()


def _make_missing(
    shards: list[Path], files: list[Path], heartbeat: Callable[[], None]
) -> list[ShardIndex]:
    def make(number: int) -> ShardIndex:
        # Another rank may have made it.
        return read_footer(files[number]) or save_index(scan(shards[number]), files[number])

    start = last_line = time.monotonic()
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        futures = {number: pool.submit(make, number) for number in _order_of_rank(len(shards))}
        running = set(futures.values())
        num_samples = 0
        while running:
            done, running = wait(running, SECONDS_OF_WAITING)
            heartbeat()
            num_samples += sum(future.result().num_samples for future in done)
            num_done = len(shards) - len(running)
            now = time.monotonic()
            if num_done and now - last_line > SECONDS_OF_LINE:
                last_line = now
                # Other ranks have made some that are not yet met here.
                num_made = sum(map(os.path.exists, files))
                seconds_left = (now - start) / num_made * (len(shards) - num_made)
                so_far = f"{num_made:,} of {len(shards):,} tars"
                samples = f"some {num_samples * num_made // num_done:,} samples"
                print_line(f"indexing: {so_far}, {samples}, {seconds_left:.0f} s left")
        return [futures[number].result() for number in range(len(shards))]
    finally:
        pool.shutdown(cancel_futures=True)


def _order_of_rank(length: int) -> list[int]:
    from ds_cmli.distributed import process_group as distributed  # with torch

    rank = distributed.rank()
    world_size = distributed.world_size()
    start = rank * length // world_size
    end = (rank + 1) * length // world_size
    # A rank that has made its own part meets the ranks that it helps in the middle of theirs.
    return [*range(start, end), *reversed(range(start)), *reversed(range(end, length))]


# --- scanning a tar


def scan(shard: Path) -> np.ndarray:
    """Return the samples of a tar, `ROW` [n], in the order of their first members.

    As in WebDataset, members with the same name up to its first dot are a sample. Raises
    `UserError` for a tar that is compressed, damaged or cut off.
    """
    with blame(f"{shard} is no whole, uncompressed tar"):
        members = read_headers(shard)
        if members is None:
            members = list(read_by_tarfile(shard))
    return group_samples(members)


def group_samples(members: list[Member]) -> np.ndarray:
    """Return the samples that members of a tar make up, `ROW` [n]."""
    samples: list[list[int]] = []
    last: dict[str, list[int]] = {}  # the last sample of each name
    links: list[tuple[list[int], int, str]] = []  # sample, its column, and what it links to
    for name, block, num_bytes, target in members:
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        field = FIELD_OF_ENDING.get(ending.lower())
        if not stem or not field:
            continue
        column = 2 * FIELDS.index(field)
        key = f"{folder}/{stem}"
        sample = last.get(key)
        if sample is None or sample[column]:
            sample = [0] * NUM_COLUMNS
            last[key] = sample
            samples.append(sample)
        sample[column] = block
        sample[column + 1] = min(num_bytes, MAX_U4)
        if target:
            links.append((sample, column, target))
    if links:
        files = {os.path.normpath(member.name): member for member in members if not member.target}
        for sample, column, target in links:
            file = files.get(os.path.normpath(target))
            sample[column] = file.block if file else 0
            sample[column + 1] = min(file.num_bytes, MAX_U4) if file else 0
    return np.array(samples, "<u4").reshape(-1, NUM_COLUMNS).view(ROW)[:, 0]


def read_by_tarfile(shard: Path) -> Iterator[Member]:
    """Yield the files and links of a tar. Raises ValueError and `tarfile`'s errors.

    `tarfile` takes a damaged header for the end of the tar, so what follows the end is checked.
    """
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            folder, _, _ = member.name.rpartition("/")
            block = member.offset_data // BLOCK_BYTES
            if block > MAX_U4:
                raise ValueError("larger than 2 TB")
            if member.isreg() and not member.issparse():
                yield Member(member.name, block, member.size, "")
            elif member.issym():
                yield Member(member.name, block, 0, f"{folder or '.'}/{member.linkname}")
            elif member.islnk():
                yield Member(member.name, block, 0, member.linkname)
        end = archive.offset
    with open(shard, "rb") as file:
        file.seek(end)
        rest = file.read(2**20)
    if len(rest) < BLOCK_BYTES or rest.strip(b"\0"):
        raise ValueError(f"damaged or cut off at byte {end:,}")


def read_headers(shard: Path) -> list[Member] | None:
    """Return the files of a tar, or None if it is damaged or has any member but plain ones.

    It reads headers alone, and takes a quarter of the time of `tarfile`.
    """
    members: list[Member] = []
    with open(shard, "rb", buffering=0) as file:
        descriptor = file.fileno()
        end = os.fstat(descriptor).st_size
        if end > MAX_U4 * BLOCK_BYTES:
            return None
        buffer = b""
        buffer_start = 0
        offset = 0
        while True:
            start = offset - buffer_start
            if start + BLOCK_BYTES > len(buffer):
                buffer = os.pread(descriptor, READ_BYTES, offset)
                buffer_start = offset
                start = 0
            header = buffer[start : start + BLOCK_BYTES]
            if not header.rstrip(b"\0"):
                rest = os.pread(descriptor, 2**20, offset)
                is_end = members and len(rest) >= BLOCK_BYTES and not rest.strip(b"\0")
                return members if is_end else None
            num_bytes = _octal(header[124:136])
            kind = header[156:157]
            if num_bytes is None or num_bytes < 0 or not _checksum_fits(header):
                return None
            content = offset + BLOCK_BYTES
            offset = content + -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
            if offset > end:
                return None
            if kind == b"x":
                start = content - buffer_start
                records = buffer[start : start + num_bytes]
                if len(records) < num_bytes:
                    records = os.pread(descriptor, num_bytes, content)
                if not _changes_dates_alone(records):
                    return None
            elif kind == b"5" and not num_bytes:
                continue
            elif kind == b"0":
                name, *_ = header[:100].split(b"\0", 1)
                prefix, *_ = header[345:500].split(b"\0", 1)
                if prefix and header[257:263] != b"ustar\0":
                    return None
                path = b"%b/%b" % (prefix, name) if prefix else name
                text = path.decode("utf-8", "surrogateescape")
                members.append(Member(text, content // BLOCK_BYTES, num_bytes, ""))
            else:
                return None


def _octal(field: bytes) -> int | None:
    digits, *_ = field.split(b"\0", 1)
    with suppress(ValueError):
        return int(digits, 8)
    return None


def _checksum_fits(header: bytes) -> bool:
    expected = _octal(header[CHECKSUM])
    if len(header) < BLOCK_BYTES or expected is None:
        return False
    # Adler-32's lower half is 1 and the sum of all bytes modulo 65,521, at a tenth of `sum`'s time.
    actual = (zlib.adler32(header) & 0xFFFF) - 1
    spaces = 8 * ord(" ")  # counted in place of the field itself
    return (actual - sum(header[CHECKSUM]) + spaces - expected) % 65521 == 0


def _changes_dates_alone(records: bytes) -> bool:
    """Return whether a pax header changes nothing of the next member but its dates."""
    keys = set()
    while records:
        length, blank, _ = records.partition(b" ")
        if not blank or not length.isdigit() or not 0 < int(length) <= len(records):
            return False
        key, _, _ = records[len(length) + 1 : int(length)].partition(b"=")
        keys.add(key)
        records = records[int(length) :]
    return keys <= {b"mtime", b"atime", b"ctime"}
