"""What lists of files and captions have in common: the source of their rows, and how JSON is read.

All of them are rows of a picture's file and a caption.
"""

import hashlib
import itertools
import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import EMPTY, Refused
from ds_cmli.data.pictures import inside, most_bytes, read_file
from ds_cmli.data.sources.base import Source

LOOKED_AT = 100  # so many of the files that a list names are looked for: the first may be missing
MOST_SIZES = 100_000  # files whose sizes identify the data; of more, as many are taken evenly


class Strings:
    """An append-only list of millions of strings, stored as UTF-8 in one buffer.

    Forked loading processes share the buffer. A list of `str` would gradually be copied into each
    of them, because reference counting writes to its objects (copy-on-write).
    """

    def __init__(self, strings: Iterable[str] = ()):
        self.text, self.ends = bytearray(), array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        self.text += string.encode()
        self.ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.text[self.ends[index] : self.ends[index + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


class Listed(Source):
    """Rows of a picture's file and a caption; all rows with one file are captions of one picture.

    Pictures are numbered in the order of their first rows; captions keep the order of the rows.
    """

    def __init__(self, where: str, folder: Path, root: Path, config: DataConfig):
        """File names are relative to `folder`.

        Files outside of `root` are only read if the configuration allows it.
        """
        self.where, self.folder, self.root = where, folder, os.path.realpath(root)
        self.most_bytes = most_bytes(config.max_pixels)
        self.follow_symlinks = config.follow_symlinks
        self.bad = []
        self.files, self.texts, self.hashes = Strings(), Strings(), array("q")
        self.unused: list[str] = []  # what `not_read` returns

    def add(self, file: str, text: str | None) -> None:
        """Append a row. All rows must be added before the source is read.

        Raises `UnicodeEncodeError`.
        """
        file = os.path.normpath(file)  # the normalised name identifies the picture
        (file + (text or "")).encode()  # raises `UnicodeEncodeError` before anything is stored
        if not text or not text.strip():
            self.bad.append((file, EMPTY))
            return
        self.files.append(file)
        self.texts.append(text)
        self.hashes.append(hash(file))

    @cached_property
    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows grouped by picture, int64 [rows], and where each picture's start, [n + 1]."""
        hashes = np.frombuffer(self.hashes, np.int64)
        _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
        in_order = np.empty(len(first), dtype=np.int64)
        in_order[np.argsort(first)] = np.arange(len(first))
        number = in_order[number]
        rows = np.argsort(number, kind="stable")
        return rows, np.searchsorted(number[rows], np.arange(len(first) + 1))

    def __len__(self) -> int:
        return len(self.groups[1]) - 1

    def image(self, index: int) -> bytes:
        path, name = self._path(index), self.name(index)
        outside = os.path.isabs(name) or name.startswith(os.pardir + os.sep)
        if outside and not self.follow_symlinks and not inside(path, self.root):
            raise Refused(
                f"a path out of {self.root}: give one in it, or data.follow_symlinks=true allows it"
            )
        return read_file(path, self.root, self.most_bytes, self.follow_symlinks)

    def not_read(self) -> list[str]:
        return self.unused

    def captions(self, index: int) -> list[str]:
        rows, starts = self.groups
        return [self.texts[row] for row in rows[starts[index] : starts[index + 1]]]

    def name(self, index: int) -> str:
        rows, starts = self.groups
        return self.files[rows[starts[index]]]

    def key(self, index: int) -> bytes:
        """The file's real path: two names of one file (by symlinks) are the same picture."""
        return os.fsencode(os.path.realpath(self._path(index)).removeprefix(self.root))

    def priorities(self) -> np.ndarray:
        """Hashes of the file names alone, so that neither order nor captions change the split."""
        digests = (hashlib.sha256(self.name(i).encode()).digest()[:8] for i in range(len(self)))
        return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)

    def fingerprint(self) -> dict[str, object]:
        content = hashlib.blake2b(digest_size=16)
        for strings in (self.files, self.texts):
            content.update(strings.text)
            content.update(strings.ends)
        # The sizes of the files, of `MOST_SIZES` at most. Dates do not count, as a copy changes
        # them.
        sizes = array("q")
        for path in self._paths(-(-len(self) // MOST_SIZES) or 1):
            try:
                sizes.append(os.stat(path).st_size)
            except (OSError, ValueError):
                sizes.append(-1)
        missing = sizes.count(-1)
        return {
            "pictures": len(self),
            "captions": len(self.texts),
            "content": content.hexdigest(),
            "bytes": sum(sizes) + missing,
            "missing": missing,
            "sizes": hashlib.blake2b(sizes, digest_size=8).hexdigest(),
        }

    def identities(self) -> np.ndarray:
        return self._identities

    @cached_property
    def _identities(self) -> np.ndarray:
        """Hashes of the real paths: two names of one file (by symlinks) are the same picture."""
        folders: dict[str, tuple[str, set[str]]] = {}
        hashes = (hash(_real_path(path, folders)) for path in self._paths())
        return np.fromiter(hashes, np.int64, len(self)).view(np.uint64)

    def caption_counts(self) -> np.ndarray:
        return np.diff(self.groups[1])

    def caption_bytes(self) -> np.ndarray:
        rows, starts = self.groups
        sizes = np.diff(self.texts.ends)[rows]
        if len(self):
            return np.maximum.reduceat(sizes, starts[:-1])
        return sizes

    def _paths(self, step: int = 1) -> Iterator[str]:
        """The paths of every `step`-th picture, in a fifth of the time that `_path` takes."""
        rows, starts = self.groups
        for row in rows[starts[:-1:step]].tolist():
            yield os.path.join(self.folder, self.files[row])

    def _path(self, index: int) -> Path:
        return self.folder / self.name(index)


def _real_path(path: str, folders: dict[str, tuple[str, set[str]]]) -> str:
    """Resolve as `os.path.realpath`, faster: `folders` keeps each folder's real path and links."""
    folder, _, name = path.rpartition(os.sep)
    folder = folder or os.sep
    if folder not in folders:
        links: set[str] = set()
        with suppress(OSError), os.scandir(folder) as entries:
            links = {entry.name for entry in entries if entry.is_symlink()}
        folders[folder] = os.path.realpath(folder), links
    real, links = folders[folder]
    if name in links:
        return os.path.realpath(path)
    return f"{real}{os.sep}{name}"


def image_folder(
    listed: Path, files: list[str], config: DataConfig, subfolders: tuple[str, ...] = ()
) -> Path:
    """The folder that holds one of the files.

    It is in `data.image_root` if given, else in the list's folder or its parent.

    Args:
        files: the first files that the list names.
        subfolders: subfolders of these that are searched too, besides "images".

    Raises:
        UserError: none of the folders holds one of the files.
    """
    roots = [listed.parent, listed.parent.parent]
    if config.image_root:
        roots = [Path(config.image_root).expanduser()]
    places = [root / sub for root in roots for sub in ("", "images", *subfolders)]
    for file, place in itertools.product(files, places):
        if "\0" in file or os.path.exists(place / file):  # the former is refused by its line
            return place
    looked = ", ".join(map(str, filter(Path.is_dir, places))) or config.image_root
    raise UserError(
        f"{listed} names the image {files[0]!r}, which is not in {looked}: give its folder by "
        "--image-root"
    )
