"""Parquet, folders of `save_to_disk` and data sets of the hub, by Hugging Face `datasets`.

It reads memory-mapped Arrow files, into which it copies parquet once, as its row groups allow no
fast random access. The cache is the user's own, and nothing in it is changed here.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_cmli.common import UserError, blame
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources import CAPTION_COLUMNS, IMAGE_COLUMNS, SPLITS, Source
from ds_cmli.data.tars import open_tars

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB = "hf://datasets/"


def library() -> Any:
    with blame("parquet, save_to_disk and hf:// need datasets (pip install 'ds-cmli[parquet]')"):
        import datasets
    return datasets


def open_parquet(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open parquet files; names such as `train-00000-of-00002.parquet` say the split of each."""
    splits: dict[str, list[str]] = {}
    for file in files:
        split = SPLITS.get(re.split("[^a-z]", file.name)[0], "train")
        splits.setdefault(split, []).append(str(file))
    if "train" not in splits:
        splits = {"train": list(map(str, files))}
    with blame(f"{files[0]} cannot be read as parquet"):
        return _arrow(library().load_dataset("parquet", data_files=splits), config)


def open_saved(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open a folder that `save_to_disk` wrote: one data set, or several splits."""
    with blame(f"{files[0]} cannot be read as data of save_to_disk"):
        return _arrow(library().load_from_disk(str(files[0])), config)


def open_hub(name: str, config: DataConfig) -> dict[str, Source]:
    """Open hf://datasets/OWNER/NAME[@REVISION]: its tars, or what `datasets` reads of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, _, given = name.removeprefix(HUB).partition("@")
    at, shards = given or None, list[Path]()
    with blame(f"{name} cannot be fetched"):
        with suppress(LocalEntryNotFoundError):  # without a network: `datasets` may have a copy
            tars = snapshot_download(repo, repo_type="dataset", revision=at, allow_patterns="*.tar")
            shards = sorted(Path(tars).rglob("*.tar"))
        if not shards:
            return _arrow(library().load_dataset(repo, revision=at), config)
    return open_tars(shards, config)


def _arrow(data: "Dataset | DatasetDict", config: DataConfig) -> dict[str, Source]:
    splits = data if isinstance(data, dict) else {"train": data}
    known = {SPLITS[split]: rows for split, rows in splits.items() if split in SPLITS}
    if not known:
        raise UserError(f"the data has the splits {', '.join(splits)}: name one train")
    return {split: Arrow(rows, config) for split, rows in known.items()}


class Arrow:
    """Rows of a `datasets.Dataset`: a column of images, and one of captions or lists of them."""

    def __init__(self, dataset: "Dataset", config: DataConfig):
        image = library().Image
        images, texts, self.columns = list[str](), list[str](), sorted(dataset.features)
        for name, feature in dataset.features.items():
            dtype = getattr(getattr(feature, "feature", feature), "dtype", "")  # or of a list's
            if isinstance(feature, image):
                dataset = dataset.cast_column(name, image(decode=False))
                images.append(name)
            elif "binary" in dtype or (isinstance(feature, dict) and "bytes" in feature):
                images.append(name)
            elif "string" in dtype:
                texts.append(name)
        self.image_key = _column(images, IMAGE_COLUMNS, config.image_key, "data.image_key")
        self.caption_key = _column(texts, CAPTION_COLUMNS, config.caption_key, "data.caption_key")
        self.images = dataset.select_columns([self.image_key]).with_format(None)
        self.texts = dataset.select_columns([self.caption_key]).with_format(None)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> bytes:
        value = self.images[index][self.image_key]
        if isinstance(value, dict):
            path = value.get("path")
            value = value["bytes"] or (path and Path(path).read_bytes())
        if not value:
            raise ValueError("no image in its row")
        return value

    def captions(self, index: int) -> list[str]:
        value = self.texts[index][self.caption_key]
        return value if isinstance(value, list) else [value]

    def name(self, index: int) -> str:
        return f"row {index}"

    def fingerprint(self) -> dict[str, object]:
        return {"images": len(self), "columns": self.columns}


def _column(columns: list[str], usual: set[str], given: str, setting: str) -> str:
    named = [given] if given else [name for name in columns if name.lower() in usual] or columns
    if len(named) != 1 or named[0] not in columns:
        raise UserError(
            f"{setting} is {given!r}, and the columns that it could name are "
            f"{', '.join(columns) or 'none'}: name the one that is meant"
        )
    return named[0]
