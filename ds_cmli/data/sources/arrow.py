"""Parquet files and folders of `save_to_disk`, read with Hugging Face `datasets`.

It reads from memory-mapped Arrow files. Parquet does not allow fast random access, because its row
groups are about 100 MB: it is copied into Arrow files once.
"""

import os
import shutil
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from ds_cmli.common.cache import is_sealed, seal
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError, check_regular
from ds_cmli.common.pretrained import reason
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Refused
from ds_cmli.data.pictures import check_bytes, most_bytes
from ds_cmli.data.sources.base import (
    Parts,
    Source,
    numbered,
    sampled,
    unused,
    usable,
)
from ds_cmli.data.sources.find import SPLITS, part_of
from ds_cmli.data.sources.tables import CAPTION_KEYS, find_columns

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder
    from pyarrow import Array

MOST_CHECKED = 10**10  # bytes of a copy that every start reads once for damage, at about 1 GB/s
Stored = list[tuple[str, int]]  # where rows are stored and how many, in their order


def load_parquet(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open parquet files.

    Names such as `train-00000-of-00002.parquet` and `validation-...` tell the part of a file. Files
    with other names belong to the training part; without any training file, all files are the
    training part.

    Raises:
        UserError: a file cannot be read, or the disk has no space for the copy.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(part_of(file) or "train", []).append(file)
    if "train" not in splits:
        splits = {"train": files}
    datasets = _copied(name, splits)
    stored_as = noted({file.name: file for file in files})
    parts = {}
    for split, dataset in datasets.items():
        stored = list(map(_stored, splits[split]))
        parts[split] = Arrow(f"{name} ({split})", dataset, stored_as, stored, config)
    notices = []
    others = [file.name for file in files if part_of(file) is None]
    if others and len(others) < len(files):
        notices.append(
            f"{len(others)} files of {name} name none of the parts {', '.join(SPLITS)} and are "
            f"trained on, the first: {others[0]}"
        )
    return Parts(parts["train"], parts.get("validation"), parts.get("test"), notices)


def _copied(name: str, splits: dict[str, list[Path]]) -> dict[str, "Dataset"]:
    """Copy parquet files into Arrow files, unless whole ones are there, and open these."""
    import datasets

    datasets.disable_progress_bars()
    data_files = {split: list(map(str, files)) for split, files in splits.items()}
    builder_of = partial(datasets.load_dataset_builder, "parquet", data_files=data_files)
    try:
        cache = Path(builder_of().cache_dir)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache}.ds-cmli.lock"):  # one process copies, the others wait
            builder = builder_of()  # only here, as it reads what a copy notes of itself
            if not _is_copied(cache):
                _copy(name, builder, list(chain.from_iterable(splits.values())))
        return {split: builder.as_dataset(split=split) for split in splits}
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # pyarrow and datasets raise nearly any exception
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UserError(
            f"data.source is {name!r}, which cannot be read ({reason(cause)}): give whole parquet "
            "files"
        ) from None


def _copy(name: str, builder: "DatasetBuilder", files: list[Path]) -> None:
    cache = Path(builder.cache_dir)
    shutil.rmtree(cache, ignore_errors=True)
    size = sum(map(os.path.getsize, files))
    if shutil.disk_usage(cache.parent).free < size:
        raise UserError(
            f"data.source is {name!r}: {cache.parent} has no room for its copy of about "
            f"{size / 1e9:.2f} GB: set HF_DATASETS_CACHE to another folder"
        )
    say(f"copying {name} into Arrow files, once: about {size / 1e9:.2f} GB in {cache}")
    builder.download_and_prepare()
    for file in cache.glob("*.arrow"):
        seal(file)  # a reader of Arrow's streams stops before it


def _is_copied(cache: Path) -> bool:
    """Whether a copy is there and, up to `MOST_CHECKED` bytes, none of its files is damaged."""
    files = list(cache.glob("*.arrow"))
    if sum(map(os.path.getsize, files)) > MOST_CHECKED:
        return True
    return bool(files) and all(map(is_sealed, files))


def load_saved(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open a folder that `save_to_disk` wrote: one data set, or several splits.

    Raises `UserError` if it cannot.
    """
    import datasets

    datasets.disable_progress_bars()
    folder = Path(name).expanduser()
    check_regular(f"data.source is {name!r}", folder, *filter(Path.is_dir, folder.iterdir()))
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(
            f"data.source is {name!r}, which cannot be read ({reason(error)}): save it again"
        ) from None
    splits = saved if isinstance(saved, dict) else {"train": saved}
    used = {SPLITS[split]: split for split in splits if split in SPLITS}
    if "train" not in used:
        raise UserError(
            f"data.source is {name!r}, which has the splits {', '.join(splits)}: name one 'train'"
        )
    stored_as = noted({str(f.relative_to(folder)): f for f in sorted(folder.rglob("*.arrow"))})
    parts = {}
    for part, split in used.items():
        rows = splits[split]
        stored = [(str(folder.resolve() / part), len(rows))]
        parts[part] = Arrow(f"{name} ({part})", rows, stored_as, stored, config)
    known = f"known are {', '.join(SPLITS)}"
    notices = [
        f"the split {split!r} of {name} is not used: {known}"
        for split in splits
        if split not in used.values()
    ]
    return Parts(parts["train"], parts.get("validation"), parts.get("test"), notices)


def noted(files: dict[str, Path]) -> dict[str, object]:
    """What a fingerprint says of files by name: their sizes, and a digest of their content."""
    sizes = {name: file.stat().st_size for name, file in files.items()}
    return {"files": sizes, "sampled": sampled(list(files.values()))}


def _stored(file: Path) -> tuple[str, int]:
    import pyarrow.parquet

    with open(file, "rb") as content:  # pyarrow opens no name that is not Unicode
        return str(file.resolve()), pyarrow.parquet.read_metadata(content).num_rows


class Arrow(Source):
    """The rows of a `datasets.Dataset`.

    One column has undecoded images, another one caption or a list of them.
    """

    def __init__(
        self,
        where: str,
        dataset: "Dataset",
        stored_as: dict[str, object],
        stored: Stored,
        config: DataConfig,
    ):
        import datasets

        self.where, self.stored_as, self.stored, self.bad = where, stored_as, stored, []
        self.most_bytes = most_bytes(config.max_pixels)
        features = dataset.features
        images = [name for name, feature in features.items() if _holds_image(feature)]
        captions = [name for name, feature in features.items() if _holds_text(feature)]
        schema = dataset.data.schema
        types = dict(zip(schema.names, map(str, schema.types), strict=True))
        named = [name for name in features if name.lower() in CAPTION_KEYS]
        # A column by the name of captions that holds none: another text is not taken in its place.
        meant = [config.caption_key] if config.caption_key else named
        by_key = config.image_key and f"data.image_key is {config.image_key!r}, and "
        _check_types(by_key + where, "the bytes of images", images, [config.image_key], types)
        by_key = config.caption_key and f"data.caption_key is {config.caption_key!r}, and "
        _check_types(by_key + where, "texts or lists of texts", captions, meant, types)
        self.image_column, self.caption_column = find_columns(where, images, captions, config)
        used = self.image_column, self.caption_column
        self.unused = unused("the columns", features, used)
        if isinstance(features[self.image_column], datasets.Image):
            dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        self.images = dataset.select_columns([self.image_column]).with_format(None)
        self.texts = dataset.select_columns([self.caption_column]).with_format(None)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> bytes:
        value = self.images[index][self.image_column]
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise Refused("no image bytes in its row")
        check_bytes(len(content), self.most_bytes)
        return content

    def captions(self, index: int) -> list[str]:
        value = self.texts[index][self.caption_column]
        texts = value if isinstance(value, list) else [value]
        return usable(list(filter(None, texts)))

    def name(self, index: int) -> str:
        return f"row {index} of {self.where}"

    def not_read(self) -> list[str]:
        return self.unused

    def fingerprint(self) -> dict[str, object]:
        return {"pictures": len(self), **self.stored_as}

    def identities(self) -> np.ndarray:
        return np.concatenate(list(starmap(numbered, self.stored)))

    def caption_counts(self) -> np.ndarray:
        return self._lengths()[0]

    def caption_bytes(self) -> np.ndarray:
        return self._lengths()[1]

    def _lengths(self) -> np.ndarray:
        """`caption_counts` and `caption_bytes`, int64 [2, n], in the order of the rows.

        A selection may have changed that.
        """
        column = self.texts.data.column(self.caption_column)
        if self.texts._indices is not None:
            column = column.take(self.texts._indices.column(0))
        lengths = map(_lengths, column.chunks)
        return np.concatenate([np.zeros((2, 0), np.int64), *lengths], axis=1)


def _check_types(
    where: str, what: str, possible: list[str], meant: list[str], types: dict[str, str]
) -> None:
    """Raise `UserError` if no column, or none of those that are `meant`, can hold `what`."""
    candidates = list(filter(types.__contains__, meant)) or list(types)
    if not {*candidates} & {*possible}:
        shown = ", ".join(f"{name} ({types[name]})" for name in candidates)
        raise UserError(
            f"{where} has no column of {what}, but {shown}: store one so, or name another"
        )


def _holds_image(feature: object) -> bool:
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature
    binary = getattr(feature, "dtype", "") in ("binary", "large_binary")
    return binary or isinstance(feature, datasets.Image)


def _holds_text(feature: object) -> bool:
    inner = getattr(feature, "feature", feature)  # the type of a list's items, if it is a list
    return getattr(inner, "dtype", "") in ("string", "large_string")


def _lengths(captions: "Array") -> np.ndarray:
    """The number of captions that are not empty and the longest one's bytes, int64 [2, rows].

    `captions` is an array of texts or of lists of texts.
    """
    import pyarrow.compute as pc

    in_lists = "list" in str(captions.type)
    texts = captions.flatten() if in_lists else captions
    sizes = pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
    sizes = sizes.astype(np.int64)
    if not in_lists:
        return np.stack([sizes > 0, sizes])
    counts = pc.fill_null(pc.list_value_length(captions), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(counts)), counts)
    lengths = np.zeros((2, len(counts)), dtype=np.int64)
    np.add.at(lengths[0], rows, sizes > 0)
    np.maximum.at(lengths[1], rows, sizes)
    return lengths
