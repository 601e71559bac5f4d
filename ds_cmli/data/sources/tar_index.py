"""The index of tar shards: where the samples of each are, found once and kept in the cache.

A shard's index is a file of rows and a footer. All ranks and threads make those that are missing;
each is kept as soon as it is made. A start reads the footers alone.
"""

import hashlib
import os
import re
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ds_cmli.commands import print_line
from ds_cmli.errors import blame
from ds_cmli.files import cache_folder

FIELDS = ("image", "text", "json")
# The column of ROW for a member's block; the next column is for its size.
COLUMN_OF_ENDING = {"jpg": 0, "jpeg": 0, "png": 0, "webp": 0, "txt": 2, "json": 4}
BLOCK_BYTES = tarfile.BLOCKSIZE
# For each field: the block at which its member's content begins, and the member's size in bytes.
# Both are 0 if the sample has no such member.
ROW = np.dtype([(name, "<u4") for field in FIELDS for name in (field, f"{field}_size")])
NUM_COLUMNS = 2 * len(FIELDS)
MAX_U4 = 2**32 - 1
MAGIC = b"cmli-ix2"
SET_CACHE = "free some space, or set DS_CMLI_CACHE"
FOOTER = struct.Struct("<8sQ16s")  # magic, samples left out, BLAKE2b of the rows
READ_BYTES = 8192  # at a header: what follows a small member is read with it
NUM_THREADS = 8  # of a rank
SECONDS_OF_WAITING = 1.0  # from one sign of progress for the watchdog to the next
SECONDS_OF_LINE = 10.0  # from one line about progress to the next


class Member(NamedTuple):
    """A member of a tar: a file, or a link to one."""

    name: str
    block: int  # at which its content begins
    num_bytes: int
    target: str  # of a link; "" of a file


class ShardIndex(NamedTuple):
    """The content of an index's footer."""

    file: Path
    num_samples: int  # with an image and captions
    left_out: int  # without image or captions
    digest: bytes  # BLAKE2b of the rows


def index_shards(shards: Sequence[Path]) -> list[ShardIndex]:
    """Return the index of each shard, made if it is not in the cache.

    Each rank of a run makes an equal part of what is missing, then helps the others. Ranks do not
    talk, because nodes may or may not share a cache: a rank skips what it finds made.

    Raises `UserError` for a shard that is compressed, damaged or cut off.
    """
    files = {shard: index_file(shard) for shard in shards}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        footers = list(pool.map(read_footer, files.values()))
    indices = {shard: index for shard, index in zip(files, footers, strict=True) if index}
    missing = {shard: file for shard, file in files.items() if shard not in indices}
    if missing:
        with blame(f"the index of tars cannot be written: {SET_CACHE}"):
            index_folder().mkdir(parents=True, exist_ok=True)
        indices |= _make_missing(missing)
    return [indices[shard] for shard in shards]


def index_folder() -> Path:
    """Return the folder of indices. Its date changes every second while indices are made."""
    return cache_folder() / "tar-index"


def index_file(shard: Path) -> Path:
    """Return the path of a shard's index: another one if the shard's path, size or date changes."""
    status = shard.stat()
    state = f"{os.path.realpath(shard)} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(os.fsencode(state)).hexdigest()
    return index_folder() / f"{digest[:24]}.index"


def read_footer(file: Path) -> ShardIndex | None:
    """Return what the footer of an index says; None if it is missing or cut off."""
    try:
        with open(file, "rb", buffering=0) as index:
            row_bytes = os.fstat(index.fileno()).st_size - FOOTER.size
            footer = os.pread(index.fileno(), FOOTER.size, max(0, row_bytes))
    except OSError:
        return None
    if row_bytes < 0 or row_bytes % ROW.itemsize or not footer.startswith(MAGIC):
        return None
    _magic, left_out, digest = FOOTER.unpack(footer)
    return ShardIndex(file, row_bytes // ROW.itemsize, left_out, digest)


def map_rows(index: ShardIndex) -> np.ndarray:
    """Return the rows of an index, `ROW` [n], in memory that all processes of a node share."""
    return np.memmap(index.file, ROW, mode="r", shape=index.num_samples)


def is_damaged(index: ShardIndex) -> bool:
    """Return True if the rows of an index are not those that were written."""
    return _digest(map_rows(index)) != index.digest


def mend_index(index: ShardIndex, shard: Path) -> None:
    """Make the index of a shard again if it is damaged."""
    if is_damaged(index):
        save_index(scan(shard), index.file)


def save_index(rows: np.ndarray, file: Path) -> ShardIndex:
    """Write and return the index of a shard, whose rows are as `scan` returns them."""
    is_whole = (rows["image_size"] > 0) & ((rows["text_size"] > 0) | (rows["json_size"] > 0))
    whole_rows = rows[is_whole]
    index = ShardIndex(file, len(whole_rows), len(rows) - len(whole_rows), _digest(whole_rows))
    with blame(f"the index of tars cannot be written to {file.parent}: {SET_CACHE}"):
        # Two ranks may make one index: each writes a file of its own, and both are equal.
        temporary = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.new")
        footer = FOOTER.pack(MAGIC, index.left_out, index.digest)
        temporary.write_bytes(whole_rows.tobytes() + footer)
        temporary.replace(file)
    return index


def _digest(rows: np.ndarray) -> bytes:
    return hashlib.blake2b(rows.tobytes(), digest_size=16).digest()


def _make_missing(files: Mapping[Path, Path]) -> dict[Path, ShardIndex]:
    """Make and return the index of each shard. `files`: the path of each shard's index."""

    def make(shard: Path) -> ShardIndex:
        # Another rank may have made it.
        return read_footer(files[shard]) or save_index(scan(shard), files[shard])

    shards = list(files)
    start_time = time.monotonic()
    last_line_time = start_time
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        futures = {n: pool.submit(make, shards[n]) for n in _order_of_rank(len(shards))}
        running = set(futures.values())
        num_samples = 0
        while running:
            done, running = wait(running, SECONDS_OF_WAITING)
            os.utime(index_folder())  # progress, which the watchdog sees
            num_samples += sum(future.result().num_samples for future in done)
            num_done = len(shards) - len(running)
            time_now = time.monotonic()
            if num_done and time_now - last_line_time > SECONDS_OF_LINE:
                last_line_time = time_now
                # Count files, because other ranks make indices, too.
                num_made = sum(map(os.path.exists, files.values()))
                seconds_left = (time_now - start_time) / num_made * (len(shards) - num_made)
                so_far = f"{num_made:,} of {len(shards):,} tars"
                samples = f"some {num_samples * num_made // num_done:,} samples"
                print_line(f"indexing: {so_far}, {samples}, {seconds_left:.0f} s left")
        return {shards[n]: future.result() for n, future in futures.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _order_of_rank(length: int) -> list[int]:
    """Return the numbers below `length` in the order in which this rank makes these indices."""
    # Imported here, because it imports torch, which a process that only fetches does without.
    from ds_cmli.distributed import process_group as distributed

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
        members = list(read_members(shard))
    return group_samples(members)


def group_samples(members: list[Member]) -> np.ndarray:
    """Return the samples that members of a tar make up, `ROW` [n]."""
    samples: list[list[int]] = []
    latest_samples: dict[str, list[int]] = {}  # by name
    links: list[tuple[list[int], int, str]] = []  # sample, its column, and what it links to
    for name, block, num_bytes, target in members:
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        column = COLUMN_OF_ENDING.get(ending.lower())
        if not stem or column is None:
            continue
        key = f"{folder}/{stem}"
        sample = latest_samples.get(key)
        if sample is None or sample[column]:
            sample = [0] * NUM_COLUMNS
            latest_samples[key] = sample
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


def read_members(shard: Path) -> Iterator[Member]:
    """Yield the files and links of a tar. Raises ValueError and `tarfile`'s errors.

    `tarfile` takes a damaged header for the end of the tar, so what follows the end is checked.
    """
    with (
        open(shard, "rb", READ_BYTES) as file,
        tarfile.open(fileobj=file, mode="r:", tarinfo=FastHeader) as archive,
    ):
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            block = member.offset_data // BLOCK_BYTES
            if block > MAX_U4:
                raise ValueError("larger than 2 TB")
            if member.isreg() and not member.issparse():
                yield Member(member.name, block, member.size, "")
            elif member.issym():
                folder, _, _ = member.name.rpartition("/")
                yield Member(member.name, block, 0, f"{folder or '.'}/{member.linkname}")
            elif member.islnk():
                yield Member(member.name, block, 0, member.linkname)
        end = archive.offset
        file.seek(end)
        ending = file.read(2**20)
    if len(ending) < BLOCK_BYTES or ending.strip(b"\0"):
        raise ValueError(f"damaged or cut off at byte {end:,}")


class FastHeader(tarfile.TarInfo):
    """A member of a tar, read in a quarter of the time of `tarfile` if it is a plain file."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "FastHeader":
        file: Any = archive.fileobj
        start = file.tell()
        header = file.read(BLOCK_BYTES)
        kind = header[156:157]
        num_bytes = _content_size(header)
        padded_bytes = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if num_bytes >= 0 and not archive.pax_headers:
            if kind == tarfile.REGTYPE:
                name, _, _ = header[:100].partition(b"\0")
                if header[345]:
                    prefix, _, _ = header[345:500].partition(b"\0")
                    name = b"%b/%b" % (prefix, name)
                member = cls(name.decode("utf-8", "surrogateescape"))
                member.size = num_bytes
                member.offset_data = start + BLOCK_BYTES
                archive.offset = member.offset_data + padded_bytes  # type: ignore[attr-defined]
                return member
            if kind == tarfile.XHDTYPE and _are_dates(file.read(padded_bytes)[:num_bytes]):
                return cls.fromtarfile(archive)  # the member that has these dates
        file.seek(start)
        return super().fromtarfile(archive)


def _content_size(header: bytes) -> int:
    """Return the size of a member's content, or -1 if its header is not a valid basic one."""
    checksum_field = header[148:156]
    try:
        checksum = int(checksum_field.rstrip(b"\0 "), 8)
        num_bytes = int(header[124:136].rstrip(b"\0"), 8)
    except ValueError:
        return -1
    # Adler-32's lower half is 1 plus the sum of all bytes, modulo 65,521. It takes a tenth of
    # `sum`'s time.
    byte_sum = (zlib.adler32(header) & 0xFFFF) - 1
    spaces = 8 * ord(" ")  # counted in place of the field itself
    is_valid = (byte_sum - sum(checksum_field) + spaces - checksum) % 65521 == 0
    return num_bytes if is_valid and len(header) == BLOCK_BYTES else -1


def _are_dates(records: bytes) -> bool:
    """Return True if a pax header changes nothing of the next member but its dates."""
    lines = records.splitlines(keepends=True)
    dates = [re.fullmatch(rb"(\d+) [acm]time=[0-9.-]*\n", line) for line in lines]
    return all(date and int(date[1]) == len(line) for date, line in zip(dates, lines, strict=True))
