"""Parquet, folders of `save_to_disk` and data sets of the hub, by Hugging Face `datasets`.

It reads memory-mapped Arrow files, into which it copies parquet once, as its row groups allow no
fast random access. The cache is the user's own, and nothing in it is changed here.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ds_cmli.common.errors import UserError, blame
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources import CAPTION_COLUMNS, IMAGE_COLUMNS, SPLITS
from ds_cmli.data.tars import open_tars

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB = "hf://datasets/"


def open_parquet(files: list[Path], config: DataConfig) -> dict[str, "Arrow"]:
    """Open parquet files; names such as `train-00000-of-00002.parquet` say the split of each."""
    import datasets

    splits: dict[str, list[str]] = {}
    for file in files:
        prefix = re.match(r"([a-z]+)[-_.]", file.name)
        splits.setdefault(SPLITS.get(prefix[1] if prefix else "", "train"), []).append(str(file))
    if "train" not in splits:
        splits = {"train": list(map(str, files))}
    with blame(f"{files[0]} cannot be read as parquet"):
        return _arrow(datasets.load_dataset("parquet", data_files=splits), config)


def open_saved(files: list[Path], config: DataConfig) -> dict[str, "Arrow"]:
    """Open a folder that `save_to_disk` wrote: one data set, or several splits."""
    import datasets

    (folder,) = files
    with blame(f"{folder} cannot be read as data of save_to_disk"):
        saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        saved = {"train": saved}
    return _arrow(saved, config)


def open_hub(name: str, config: DataConfig):
    """Open hf://datasets/OWNER/NAME[@REVISION]: its tars, or what `datasets` reads of it."""
    import datasets
    from huggingface_hub import HfApi, snapshot_download

    repo, _, revision = name.removeprefix(HUB).partition("@")
    with blame(f"{name} cannot be fetched"):
        try:
            files = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision or None)
            tars = any(file.endswith(".tar") for file in files)
        except Exception:  # without a network: what the cache has
            tars = True
        shards: list[Path] = []
        if tars:
            folder = snapshot_download(
                repo, repo_type="dataset", revision=revision or None, allow_patterns=["*.tar"]
            )
            shards = sorted(Path(folder).rglob("*.tar"))
        if not shards:
            return _arrow(datasets.load_dataset(repo, revision=revision or None), config)
    return open_tars(shards, config)


def _arrow(splits: "dict[str, Dataset] | DatasetDict", config: DataConfig) -> dict[str, "Arrow"]:
    known = {SPLITS[split]: rows for split, rows in splits.items() if split in SPLITS}
    if not known:
        raise UserError(f"the data has the splits {', '.join(splits)}: name one train")
    return {split: Arrow(rows, config) for split, rows in known.items()}


class Arrow:
    """Rows of a `datasets.Dataset`: a column of images, and one of captions or lists of them."""

    def __init__(self, dataset: "Dataset", config: DataConfig):
        import datasets

        features = dataset.features
        images = [name for name in features if _holds(features[name], ("binary", "large_binary"))]
        texts = [name for name in features if _holds(features[name], ("string", "large_string"))]
        self.image_key = _column(images, IMAGE_COLUMNS, config.image_key, "data.image_key")
        self.caption_key = _column(texts, CAPTION_COLUMNS, config.caption_key, "data.caption_key")
        self.columns = sorted(features)
        if isinstance(features[self.image_key], datasets.Image):
            dataset = dataset.cast_column(self.image_key, datasets.Image(decode=False))
        self.images = dataset.select_columns([self.image_key]).with_format(None)
        self.texts = dataset.select_columns([self.caption_key]).with_format(None)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> bytes:
        value = self.images[index][self.image_key]
        if not isinstance(value, dict):
            return value
        return value.get("bytes") or Path(value["path"]).read_bytes()

    def captions(self, index: int) -> list[str]:
        value = self.texts[index][self.caption_key]
        return value if isinstance(value, list) else [value]

    def name(self, index: int) -> str:
        return f"row {index}"

    def fingerprint(self) -> dict[str, object]:
        return {"images": len(self), "columns": self.columns}


def _holds(feature: object, dtypes: tuple[str, ...]) -> bool:
    import datasets

    if "binary" in dtypes and (isinstance(feature, datasets.Image) or _is_file(feature)):
        return True
    inner = getattr(feature, "feature", feature)  # the type of a list's items
    return getattr(inner, "dtype", "") in dtypes


def _is_file(feature: object) -> bool:
    return isinstance(feature, dict) and "bytes" in feature


def _column(columns: list[str], usual: tuple[str, ...], given: str, setting: str) -> str:
    named = [given] if given else [name for name in columns if name.lower() in usual] or columns
    if len(named) != 1 or named[0] not in columns:
        raise UserError(
            f"{setting} is {given!r}, and the columns that it could name are "
            f"{', '.join(columns) or 'none'}: name the one that is meant"
        )
    return named[0]
