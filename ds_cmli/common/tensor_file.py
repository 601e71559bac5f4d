"""Safetensors files that carry the SHA-256 of their own bytes, as do all copies of them.

It is a value of the file's metadata, and the digest of the file in which these 64 characters are
zeros.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ds_cmli.common import checksums
from ds_cmli.common.json_text import parse

ZEROS = b"0" * 64
LONGEST_HEADER = 100_000_000  # bytes, as the library's own limit


def pieces(tensors: Mapping[str, Tensor]) -> tuple[bytes, memoryview]:
    """The file's content, its header and its tensors; equal tensors give equal bytes."""
    data = memoryview(save(dict(tensors)))
    start = 8 + int.from_bytes(data[:8], "little")
    # The library writes metadata of several keys in a random order, so they are written here.
    # transformers reads only files whose format is "pt".
    entries = {"__metadata__": {"format": "pt", checksums.KEY: ZEROS.decode()}}
    text = json.dumps(entries | json.loads(bytes(data[8:start])), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(header)
    digest.update(data[start:])
    return header.replace(ZEROS, digest.hexdigest().encode(), 1), data[start:]


def damage(path: Path) -> str | None:
    """What is wrong with a file; None if it agrees with its checksum, or has none of ours.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = file.read(8)
        text = file.read(min(int.from_bytes(size, "little"), LONGEST_HEADER))
        try:
            # Other programs' files have other numbers of values.
            first, second = parse(text, dict)["__metadata__"].values()
            # Any name, because the name may be what is damaged.
            stated = next(value.encode() for value in (second, first) if len(value) == len(ZEROS))
        except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
            return None  # the library tells what is wrong with a header
        digest = hashlib.sha256(size + text.replace(stated, ZEROS, 1))
        checksums.feed(digest.update, file)
    if digest.hexdigest().encode() == stated:
        return None
    return "its content does not match the checksum in its header"
