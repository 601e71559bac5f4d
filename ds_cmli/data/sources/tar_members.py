"""The members of one tar archive, and the samples that they make.

As in WebDataset, a sample consists of the members with the same name up to its first dot. They may
be in any order. A hard link has the content of the file that it names.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ds_cmli.common.errors import UserError, printable
from ds_cmli.data.bad import EMPTY, Bad

IMAGES = ("jpg", "jpeg", "png", "webp")
FIELDS = {**dict.fromkeys(IMAGES, "image"), "txt": "text", "json": "json"}
ENDS = tuple(f".{ending}" for ending in FIELDS)
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

Content = tuple[int, int]  # offset in the shard and size in bytes
# By field: where it is, or the kind of a member that is not read.
Members = dict[str, Content | str]
NotRead = dict[str, tuple[int, str]]  # by kind of member: how many, and the first one's name


def scan(path: Path) -> tuple[np.ndarray, list[Bad], NotRead]:
    """The usable samples, `ROW` [n], in the order of their first members; the others; the rest.

    Raises:
        UserError: the file is not a tar archive, is empty, or is compressed.
    """
    samples: list[tuple[str, Members]] = []
    last: dict[str, Members] = {}  # the last sample of each name
    contents: dict[str, Content] = {}  # of the files so far, by name
    bad: list[Bad] = []
    not_read: NotRead = {}
    with open(path, "rb") as file:
        for member in _members(file, path):
            if isinstance(member, str):
                bad.append((printable(path.name), member))
                continue
            if member.isdir():
                continue
            content = _content(member, contents)
            key = KEY.fullmatch(member.name)
            field = FIELDS.get(key[2].lower()) if key else None
            if key is None or field is None:
                _count(not_read, _other(member, content), f"{path.name}/{member.name}")
                continue
            sample = last.get(key[1])
            if sample is None or field in sample:  # a repeated name begins another sample
                sample = last[key[1]] = {}
                samples.append((key[1], sample))
            sample[field] = content
        end = os.fstat(file.fileno()).st_size
    rows = np.zeros(len(samples), dtype=ROW)
    good = 0
    for name, sample in samples:
        whole: dict[str, Content] = {}
        kinds: list[str] = []
        for field, content in sample.items():
            if isinstance(content, str):
                kinds.append(content)
            else:
                whole[field] = content
        reason = _defect(whole, end)
        if reason:
            reason = " but ".join([reason, *kinds])
            bad.append((printable(f"{path.name}/{name}"), reason))
            continue
        for kind in kinds:
            _count(not_read, kind, f"{path.name}/{name}")
        for field, (start, size) in whole.items():
            rows[good][field], rows[good][f"{field}_size"] = start, size
        good += 1
    return rows[:good].copy(), bad, not_read


def _content(member: tarfile.TarInfo, contents: dict[str, Content]) -> Content | str:
    """Where a member's content is, or what kind of member it is if it has none to be read."""
    if member.issparse():
        return "a sparse file"
    if member.isreg():
        contents[member.name] = member.offset_data, member.size
    elif member.islnk() and member.linkname in contents:
        contents[member.name] = contents[member.linkname]
    elif member.islnk():
        return "a hard link to no file before it"
    elif member.issym():
        return "a symlink"
    else:
        return f"a member of the tar type {member.type.decode('latin-1')!r}"
    return contents[member.name]


def _other(member: tarfile.TarInfo, content: Content | str) -> str:
    """The kind of a member that belongs to no sample."""
    if isinstance(content, str):
        return content
    if member.name.lower().endswith(ENDS):
        return "a name with a dot in its stem"
    return "a file of another ending"


def _count(not_read: NotRead, kind: str, name: str) -> None:
    count, first = not_read.get(kind, (0, printable(name)))
    not_read[kind] = count + 1, first


def _defect(sample: dict[str, Content], end: int) -> str | None:
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
        archive = tarfile.TarFile(fileobj=file, ignore_zeros=True, encoding="utf-8")
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
