"""Checksums of what is read again later: of a JSON object in itself, of a file's lines next to it.

They find damage, not forgery. What has none agrees.
"""

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from ds_cmli.common import json_text

KEY = "sha256"
READ_BYTES = 1 << 20
LINES = ".crc32"  # at the end of the name of the file with the checksum of each line


def sealed(content: Mapping[str, object]) -> dict[str, object]:
    """The object with its checksum."""
    text = json.dumps({**content, KEY: ""}, sort_keys=True)
    return {**content, KEY: hashlib.sha256(text.encode()).hexdigest()}


def read(path: Path, finite: bool = False) -> dict:
    """The JSON object in a file, as `json_text.read` returns it; ValueError as of `verify` too."""
    content = json_text.read(path, dict, finite)
    verify(content)
    return content


def verify(content: Mapping[str, object]) -> None:
    """Raise ValueError if an object that was read does not agree with its checksum."""
    if KEY in content and sealed(content)[KEY] != content[KEY]:
        raise ValueError(
            f"does not agree with its checksum: give an undamaged copy, or remove its {KEY!r} if "
            "it was changed on purpose"
        )


def of_file(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        feed(digest.update, file)
    return digest.hexdigest()


def feed(update: Callable[[bytes], object], file: IO[bytes], size: float = math.inf) -> None:
    """Give a digest's `update` the rest of a file, or its next `size` bytes, in blocks."""
    while block := file.read(int(min(size, READ_BYTES))):
        update(block)
        size -= len(block)


def of_lines(lines: bytes) -> bytes:
    """The checksums of whole lines, one a line."""
    return b"".join(map(_of_line, lines.split(b"\n")[:-1]))


def _of_line(line: bytes) -> bytes:
    return b"%08x\n" % zlib.crc32(line)


def changed(lines: Sequence[bytes], file: Path) -> list[int]:
    """The numbers, from 1, of the lines of `file` that do not agree with their checksums.

    The order counts. Lines after the last one with a checksum have none, and checksums may be of
    lines that are gone.
    """
    content = b""
    with suppress(FileNotFoundError):
        content = file.with_name(file.name + LINES).read_bytes()
    sums = re.findall(rb"^[0-9a-f]{8}\n", content, re.MULTILINE)
    numbers, place = [], 0
    for number, line in enumerate(lines, 1):
        try:
            place = sums.index(_of_line(line), place) + 1
        except ValueError:
            if place < len(sums):
                numbers.append(number)
    return numbers
