"""Parquet files and folders of `save_to_disk`, read with Hugging Face `datasets` from memory-mapped Arrow files.

Parquet does not allow fast random access, because its row groups are about 100 MB. It is copied into Arrow files once.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.common.pretrained import reason
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Refused
from ds_cmli.data.pictures import check_bytes, most_bytes
from ds_cmli.data.sources.base import Parts, Source, numbered, usable
from ds_cmli.data.sources.names import SPLITS, part_of
from ds_cmli.data.sources.tables import find_columns

Stored = list[tuple[str, int]]  # where rows are stored and how many, in their order


def load_parquet(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open parquet files. Names such as `train-00000-of-00002.parquet` and `validation-...` tell the part of a file.

    Files with other names belong to the training part; without any training file, all files are the training part.

    Raises:
        UserError: `datasets` is missing, a file cannot be read, or the disk has no space for the copy.
    """
    datasets = _library(name)
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(part_of(file) or "train", []).append(file)
    if "train" not in splits:
        splits = {"train": files}
    try:
        builder = datasets.load_dataset_builder(
            "parquet", data_files={k: list(map(str, v)) for k, v in splits.items()}
        )
        cache = Path(builder.cache_dir)
        if not cache.exists():
            size = sum(file.stat().st_size for file in files)
            home = next(folder for folder in cache.parents if folder.exists())
            if shutil.disk_usage(home).free < size:
                raise UserError(
                    f"data.source is {name!r}: {home} has no room for its copy of about {size / 1e9:.2f} GB: "
                    "set HF_DATASETS_CACHE to another folder"
                )
            say(f"copying {name} into Arrow files, once: about {size / 1e9:.2f} GB in {cache}")
        builder.download_and_prepare()  # it takes a lock: one process copies, the others wait
        parts = {split: builder.as_dataset(split=split) for split in splits}
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # pyarrow and datasets raise nearly any exception
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UserError(
            f"data.source is {name!r}, which cannot be read ({reason(cause)}): give whole parquet files"
        ) from None
    stored = {split: [_stored(file) for file in some] for split, some in splits.items()}
    sizes = {file.name: file.stat().st_size for file in files}
    opened = _parts(name, parts, sizes, stored, config)
    others = [file.name for file in files if part_of(file) is None]
    if others and len(others) < len(files):
        opened.notices.append(
            f"{len(others)} files of {name} name none of the parts {', '.join(SPLITS)} and are trained on, the first: "
            f"{others[0]}"
        )
    return opened


def load_saved(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open a folder that `save_to_disk` wrote: one data set, or several splits. Raises `UserError` if it cannot."""
    datasets = _library(name)
    folder = Path(name).expanduser()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(
            f"data.source is {name!r}, which cannot be read ({reason(error)}): save it again"
        ) from None
    parts = (
        {SPLITS[k]: v for k, v in found.items() if k in SPLITS}
        if isinstance(found, dict)
        else {"train": found}
    )
    if "train" not in parts:
        raise UserError(
            f"data.source is {name!r}, which has the splits {', '.join(found)}: name one 'train'"
        )
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*.arrow")}
    stored = {split: [(str(folder.resolve() / split), len(rows))] for split, rows in parts.items()}
    opened = _parts(name, parts, sizes, stored, config)
    if isinstance(found, dict):
        used = [id(rows) for rows in parts.values()]
        unused = [split for split, rows in found.items() if id(rows) not in used]
        known = f"known are {', '.join(SPLITS)}"
        opened.notices += [f"the split {k!r} of {name} is not used: {known}" for k in unused]
    return opened


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data.source is {name!r}, which is read by the package datasets: pip install 'ds-cmli[parquet]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _stored(file: Path) -> tuple[str, int]:
    import pyarrow.parquet

    return str(file.resolve()), pyarrow.parquet.read_metadata(file).num_rows


def _parts(
    name: str,
    parts: dict[str, Any],
    sizes: dict[str, int],
    stored: dict[str, Stored],
    config: DataConfig,
) -> Parts:
    """The parts of a data set; `stored` tells where the rows of each lie."""
    found: dict[str, Arrow] = {}
    for split, dataset in parts.items():
        found[split] = Arrow(f"{name} ({split})", dataset, sizes, stored[split], config)
    return Parts(found["train"], found.get("validation"), found.get("test"))


class Arrow(Source):
    """The rows of a `datasets.Dataset`: a column of undecoded images, and a column of one caption or a list of them."""

    def __init__(
        self, where: str, dataset: Any, sizes: dict[str, int], stored: Stored, config: DataConfig
    ):
        import datasets

        self.where, self.sizes, self.stored, self.bad = where, sizes, stored, []
        self.most_bytes = most_bytes(config.max_pixels)
        features = dataset.features
        images = [k for k, v in features.items() if _holds_image(v)]
        captions = [k for k, v in features.items() if _holds_text(v)]
        self.image_column, self.caption_column = find_columns(where, images, captions, config)
        if isinstance(features[self.image_column], datasets.Image):
            dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        self.images, self.texts = (
            dataset.select_columns([column]).with_format(None)
            for column in (self.image_column, self.caption_column)
        )

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
        return usable(
            [text for text in (value if isinstance(value, list) else [value]) if text is not None]
        )

    def name(self, index: int) -> str:
        return f"row {index} of {self.where}"

    def fingerprint(self) -> dict[str, Any]:
        return {"pictures": len(self), "files": self.sizes}

    def identities(self) -> np.ndarray:
        return np.concatenate([numbered(place, rows) for place, rows in self.stored])

    def caption_counts(self) -> np.ndarray:
        counts = [_lengths(chunk)[0] for chunk in self._chunks()]
        return np.concatenate(counts) if counts else np.zeros(0, np.int64)

    def caption_bytes(self) -> np.ndarray:
        sizes = [_lengths(chunk)[1] for chunk in self._chunks()]
        return np.concatenate(sizes) if sizes else np.zeros(0, np.int64)

    def _chunks(self) -> list[Any]:
        """The captions as Arrow arrays in the order of the rows, which a selection may have changed."""
        column = self.texts.data.column(self.caption_column)
        indices = self.texts._indices
        return (column if indices is None else column.take(indices.column(0))).chunks


def _holds_image(feature: Any) -> bool:
    import datasets

    struct = isinstance(feature, dict) and "bytes" in feature
    return (
        struct
        or isinstance(feature, datasets.Image)
        or getattr(feature, "dtype", "") in ("binary", "large_binary")
    )


def _holds_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # the type of a list's items, if it is a list
    return getattr(inner, "dtype", "") in ("string", "large_string")


def _lengths(captions: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of an Arrow array of texts or of lists: how many not empty each row has, and the longest's bytes."""
    import pyarrow.compute as pc

    if "list" not in str(captions.type):
        sizes = pc.fill_null(pc.binary_length(captions), 0).to_numpy(zero_copy_only=False)
        return (sizes > 0).astype(np.int64), sizes.astype(np.int64)
    counts = pc.fill_null(pc.list_value_length(captions), 0).to_numpy(zero_copy_only=False)
    sizes = pc.fill_null(pc.binary_length(captions.flatten()), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(counts)), counts)
    full, longest = np.zeros((2, len(counts)), dtype=np.int64)
    np.add.at(full, rows, sizes > 0)
    np.maximum.at(longest, rows, sizes)
    return full, longest
