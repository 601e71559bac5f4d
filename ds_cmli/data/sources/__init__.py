"""Sources of pairs: the protocol of a source, and the names of splits and columns.

`lists`, `arrow` and `tars` each open, read and fingerprint one form of data.

A source is opened before the loading processes are forked, and all of them read it. So it holds no
Python object for each sample, because reference counts would copy its memory into every process
(`Packed` and arrays are shared), and it reads open files by `os.pread`, because processes share a
file's position.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

# A split's name in the data -> the part that it is here.
PART_OF_SPLIT = {"train": "train", "restval": "train", "test": "test"}
PART_OF_SPLIT |= dict.fromkeys(("validation", "valid", "val"), "validation")

# The usual names of the columns of images and of captions.
USUAL_COLUMNS = {
    "image": "filepath file_name filename image image_path img path jpg png image_bytes bytes",
    "caption": "title caption captions text sentences",
}
COLUMN_SETTINGS = {
    "image": "data.image_key (--csv-img-key)",
    "caption": "data.caption_key (--csv-caption-key)",
}

# The text, or if `data.caption_weights` is given: the column or key, and the text.
Caption = str | tuple[str, str]

ROWS_OF_SHARD = 10_000  # of a source that is not in shards, whose order cuts it into as many

MAX_FULL = 10_000_000  # images in shards; the order of more is windowed unless a setting says so


class Source(Protocol):
    """Images with one or more captions each, by number.

    Any exception of `image` and `captions` but `UserError` makes the sample a bad one.

    A source may have the attributes `left_out` (number of images without a caption), `shard_sizes`
    (see the function) and `is_remote`, and a method `prefetch` (see `Images.prefetch`).
    """

    def __len__(self) -> int: ...
    def image(self, index: int) -> bytes: ...  # the content of the image's file, undecoded
    def captions(self, index: int) -> Sequence[Caption]: ...  # at least one
    def name(self, index: int) -> str: ...  # in messages
    def fingerprint(self) -> Mapping[str, object]: ...  # equal when a run resumes, as JSON


def shard_sizes(source: Source) -> np.ndarray:
    """Return the numbers of images, int64 [S], of the shards that hold a source, in its order.

    A source in files of many images each has an attribute of this name. Others are cut into equal
    parts, as any of their images can be read as fast as the next one.
    """
    sizes = getattr(source, "shard_sizes", None)
    if sizes is None:
        sizes = np.diff([*range(0, len(source), ROWS_OF_SHARD), len(source)])
    return np.asarray(sizes, np.int64)


def is_large(source: Source) -> bool:
    """Return whether a source is remote, or in shards with more than `MAX_FULL` images."""
    is_sharded = hasattr(source, "shard_sizes")
    return is_sharded and (getattr(source, "is_remote", False) or len(source) > MAX_FULL)


def captions_by_column(row: Mapping[str, Any], columns: Iterable[str]) -> list[tuple[str, str]]:
    """Return the captions in some columns of a row, which may lack them: each a text or a list."""
    captions: list[tuple[str, str]] = []
    for column in columns:
        value: Any = row.get(column)
        captions += [(column, text) for text in (value if isinstance(value, list) else [value])]
    return captions


def find_column(columns: Iterable[str], kind: Literal["image", "caption"]) -> str:
    """Return the only column that has a usual name. Raises `ValueError`, naming the setting."""
    names = [name for name in columns if name.lower() in USUAL_COLUMNS[kind].split()]
    # The names of Hugging Face's imagefolder come before others.
    names = [name for name in names if name in ("file_name", "text")] or names
    if len(names) != 1:
        need = f"give {COLUMN_SETTINGS[kind]}; columns are separated by tabs or commas"
        raise ValueError(f"the columns are {', '.join(columns)}: {need}")
    return names[0]
