"""JSON that lists pictures and their captions: Karpathy's splits of COCO and Flickr30k, and COCO's own annotations."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources.base import Parts, Source
from ds_cmli.data.sources.images_of import image_folder
from ds_cmli.data.sources.listed import Listed

# Karpathy's names of the splits; "restval", the rest of COCO's validation set, is usually trained on.
SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
EXPECTED = (
    'expected are Karpathy\'s {"images": [{"filename", "split", "sentences"}]} or COCO\'s {"images", "annotations"}'
)


def load_json(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open a JSON file. Raises `UserError` if it has neither of the two formats, or the images are not found."""
    if len(files) > 1:
        raise UserError(f"data.source is {name!r}, which are {len(files)} files: give each its own --data")
    path = files[0]
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): {EXPECTED}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    try:
        rows = [_checked(*row) for row in (_annotated(content) if "annotations" in content else _karpathy(content))]
    except (KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise UserError(f"{path} has not what it takes ({type(error).__name__}: {error}): {EXPECTED}") from None
    if not rows:
        raise UserError(f"{path} has no caption: {EXPECTED}")
    # COCO keeps `captions_train2017.json` in annotations/, and the images in train2017/ beside that folder.
    subset = re.sub(r"^captions_", "", path.stem)
    folder = image_folder(path, rows[0][1], config, (subset, f"images/{subset}"))
    parts: dict[str, Listed] = {}
    for split, file, caption in rows:
        part = parts.setdefault(split, Listed(f"{name} ({split})", folder, folder, config))
        part.add(file, caption)
    only: Source = next(iter(parts.values()))
    return Parts(parts.get("train", only), parts.get("validation"), parts.get("test"))


def _checked(split: str, file: str, caption: str) -> tuple[str, str, str]:
    (file + caption).encode()
    if not file or "\0" in file or Path(file).is_absolute() or ".." in Path(file).parts:
        raise TypeError(f"{file!r} is no path inside a folder")
    return split, file, caption


def _karpathy(content: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the split, the file and the text of each caption."""
    for image in content["images"]:
        file = "/".join(filter(None, (image.get("filepath"), image["filename"])))
        for sentence in image["sentences"]:
            yield SPLITS[image["split"]], file, sentence["raw"]


def _annotated(content: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    files = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        yield "train", files[annotation["image_id"]], annotation["caption"]
