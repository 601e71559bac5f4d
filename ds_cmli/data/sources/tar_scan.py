"""One pass over a tar shard, which finds the byte ranges of each sample's image and caption, and broken samples.

As in WebDataset, a sample consists of the members with the same name up to its first dot. They may be in any order.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ds_cmli.common.errors import UserError
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
