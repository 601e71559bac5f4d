"""Arrow and parquet by `datasets`: parquet files, folders of save_to_disk, data sets of the hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import read_image_file
from ds_cmli.data.sources import PART_OF_SPLIT, Caption, Source, captions_by_column, find_column
from ds_cmli.errors import UserError, blame

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def import_datasets() -> Any:
    with blame("parquet, save_to_disk and hf:// need datasets (pip install 'ds-cmli[parquet]')"):
        import datasets
    return datasets


def open_parquet(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open parquet files; names such as `train-00000-of-00002.parquet` say the split of each."""
    parts: dict[str, list[str]] = {}
    for file in files:
        split, *_ = re.split("[^a-z]", file.name)
        parts.setdefault(PART_OF_SPLIT.get(split, "train"), []).append(str(file))
    if "train" not in parts:
        parts = {"train": list(map(str, files))}
    with blame(f"{files[0]} cannot be read as parquet"):
        return arrow_parts(import_datasets().load_dataset("parquet", data_files=parts), config)


def open_saved(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open a folder that `save_to_disk` wrote: one data set, or several splits."""
    (folder,) = files
    with blame(f"{folder} cannot be read as data of save_to_disk"):
        return arrow_parts(import_datasets().load_from_disk(str(folder)), config)


def arrow_parts(data: "Dataset | DatasetDict", config: DataConfig) -> dict[str, Source]:
    splits = data if isinstance(data, dict) else {"train": data}
    parts = {PART_OF_SPLIT[name]: rows for name, rows in splits.items() if name in PART_OF_SPLIT}
    if not parts:
        raise UserError(f"the data has the splits {', '.join(splits)}: name one train")
    return {part: ArrowRows(rows, config) for part, rows in parts.items()}


class ArrowRows:
    """Rows of a `datasets.Dataset`: a column of images, and one of captions or lists of them.

    It reads memory-mapped Arrow files, into which the library copies parquet once, because row
    groups allow no fast random access. The cache is the user's own; nothing in it is changed here.
    """

    def __init__(self, dataset: "Dataset", config: DataConfig):
        image_type = import_datasets().Image
        image_columns: list[str] = []
        text_columns: list[str] = []
        self.columns = sorted(dataset.features)
        for name, feature in dataset.features.items():
            dtype = getattr(getattr(feature, "feature", feature), "dtype", "")  # or of a list's
            if isinstance(feature, image_type):
                dataset = dataset.cast_column(name, image_type(decode=False))
                image_columns.append(name)
            elif "binary" in dtype or (isinstance(feature, dict) and "bytes" in feature):
                image_columns.append(name)
            elif "string" in dtype:
                text_columns.append(name)
        self.image_key = config.image_key or _only(image_columns, "image")
        self.caption_weights = config.caption_weights
        self.caption_keys = list(self.caption_weights or filter(None, [config.caption_key]))
        if not self.caption_keys:
            self.caption_keys = [_only(text_columns, "caption")]
        self.images = dataset.select_columns([self.image_key]).with_format(None)
        self.texts = dataset.select_columns(self.caption_keys).with_format(None)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> bytes:
        value = self.images[index][self.image_key]
        if isinstance(value, dict):
            path = value.get("path")
            value = value["bytes"] or (path and read_image_file(Path(path)))
        if not value:
            raise ValueError("no image in its row")
        return value

    def captions(self, index: int) -> Sequence[Caption]:
        captions = captions_by_column(self.texts[index], self.caption_keys)
        return captions if self.caption_weights else [text for _, text in captions]

    def name(self, index: int) -> str:
        return f"row {index}"

    def fingerprint(self) -> dict[str, object]:
        # `datasets`' own fingerprint depends on paths and dates of files, which do not count here.
        num_bytes = {"image": self.images.data.nbytes, "caption": self.texts.data.nbytes}
        return {"images": len(self), "columns": self.columns, "bytes": num_bytes}


def _only(columns: list[str], kind: Literal["image", "caption"]) -> str:
    """Return the only column of a type, or of several the one of a usual name."""
    return columns[0] if len(columns) == 1 else find_column(columns, kind)
