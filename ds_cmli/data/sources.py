"""Sources of pairs: what one is, and lists of image files with captions.

A source is opened before the loading processes are forked, and all of them read it. So it holds no
Python object for each sample, whose reference counts would copy its memory into every process
(`Packed` and memory-mapped arrays are shared), and reads open files by `os.pread`, as processes
share a file's position.
"""

import csv
import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import numpy as np

from ds_cmli.common import UserError, blame, one_line
from ds_cmli.config.schema import DataConfig

IMAGE_COLUMNS = {"filepath", "file_name", "filename", "image", "image_path", "img", "path"}
IMAGE_COLUMNS |= {"jpg", "png", "image_bytes", "bytes"}
CAPTION_COLUMNS = {"title", "caption", "captions", "text", "sentences"}
SPLITS = {"train": "train", "restval": "train", "test": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val"), "validation")
METADATA = ("metadata.csv", "metadata.jsonl")
LOOKED_AT = 100  # so many of the files that a list names are looked for: the first may be missing
Rows = Iterator[tuple[str, str, list[str | None]]]  # split, image file, captions


class Source(Protocol):
    """Images with one or more captions each, by number.

    Any exception of `image` and `captions` makes the sample a bad one.
    """

    def __len__(self) -> int: ...
    def image(self, index: int) -> bytes: ...  # the content of the image's file, undecoded
    def captions(self, index: int) -> list[str]: ...  # at least one
    def name(self, index: int) -> str: ...  # in messages
    def fingerprint(self) -> Mapping[str, object]: ...  # equal when a run resumes, as JSON


class Packed:
    """A list of objects, pickled into one buffer that forked processes share."""

    def __init__(self, items: Iterable[object]):
        self.buffer, ends = bytearray(), [0]
        for item in items:
            self.buffer += pickle.dumps(item, -1)
            ends.append(len(self.buffer))
        self.ends = np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int):
        return pickle.loads(memoryview(self.buffer)[self.ends[index] : self.ends[index + 1]])


class Files:
    """Images in files, with the captions that a list has of them."""

    def __init__(self, root: Path, captions: dict[str, list[str]]):
        self.root = root
        self.rows = Packed((file, texts) for file, texts in captions.items() if texts)
        self.left_out = len(captions) - len(self.rows)  # those without a caption

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> bytes:
        return (self.root / self.name(index)).read_bytes()

    def captions(self, index: int) -> list[str]:
        return self.rows[index][1]

    def name(self, index: int) -> str:
        return self.rows[index][0]

    def fingerprint(self) -> dict[str, object]:
        digest = hashlib.blake2b(self.rows.buffer, digest_size=16).hexdigest()
        return {"images": len(self), "content": digest}


def open_folder(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open a folder with a metadata.csv or .jsonl, or with such folders train/ and validation/."""
    (folder,) = files
    parts: dict[str, Source] = {}
    for name, split in {"": "train", **SPLITS}.items():
        lists = [file for metadata in METADATA for file in (folder / name).glob(metadata)]
        if len(lists) + (split in parts) > 1:
            raise UserError(f"{folder} has several lists, as {lists[-1]}: keep one for {split}")
        if lists:
            parts |= {split: _files(_table(lists[0], config), lists[0], config)["train"]}
    return parts


def open_tables(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open CSV, TSV or JSON lines; all rows with one image file are captions of one image."""
    rows = chain.from_iterable(_table(file, config) for file in files)
    return _files(rows, files[0], config)


def open_json(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open COCO's annotations, or Karpathy's splits of COCO or Flickr30k."""
    if len(files) > 1:
        raise UserError(f"{files[0]} and {len(files) - 1} others: give each its own --data")
    with blame(f"{files[0]} is no list of captions as COCO's or Karpathy's"):
        return _files(_coco(files[0]), files[0], config)


def _files(rows: Rows, path: Path, config: DataConfig) -> dict[str, Source]:
    captions: dict[str, dict[str, list[str]]] = {}
    for split, file, texts in rows:
        image = captions.setdefault(split, {}).setdefault(os.path.normpath(file), [])
        image += [text for text in texts if text and text.strip()]
    if not captions:
        raise UserError(f"{path} has no row: give each image a file name and a caption")
    named = list(islice(chain.from_iterable(captions.values()), LOOKED_AT))
    # COCO keeps captions_train2017.json in annotations/, and the images in train2017/ next to it.
    subset = path.stem.removeprefix("captions_")
    given = [Path(os.path.expanduser(config.image_root))] if config.image_root else []
    for root in given or [path.parent, path.parent.parent]:
        for place in (root, root / "images", root / subset, root / "images" / subset):
            if any((place / file).exists() for file in named):
                return {split: Files(place, of_split) for split, of_split in captions.items()}
    raise UserError(
        f"{path} names the image {named[0]!r}, which is not in {(*given, path.parent)[0]}: give "
        "its folder by --image-root"
    )


def _table(path: Path, config: DataConfig) -> Rows:
    """The rows of a CSV, TSV or JSON lines; an error names the line."""
    image, caption = config.image_key, config.caption_key
    line = usable = 0

    def lines() -> Iterator[str]:
        nonlocal line
        for text in file:
            line += 1
            yield text

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows: Iterable[dict] = map(json.loads, filter(str.strip, lines()))
            if path.suffix.lower() != ".jsonl":
                separator = "\t" if "\t" in file.readline() else ","
                file.seek(0)
                rows = csv.DictReader(lines(), delimiter=separator, strict=True)
            for row in rows:
                if isinstance(rows, csv.DictReader) and (None in row or None in row.values()):
                    raise ValueError("not as many cells as line 1 has: put texts in quotes")
                image = image or _column(row, IMAGE_COLUMNS, "data.image_key (--csv-img-key)")
                caption = caption or _column(
                    row, CAPTION_COLUMNS, "data.caption_key (--csv-caption-key)"
                )
                name, texts = row[image], row[caption]
                texts = texts if isinstance(texts, list) else [texts]
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{image} is {name!r}: give the image's path")
                if not all(text is None or isinstance(text, str) for text in texts):
                    raise ValueError(f"{caption} is {row[caption]!r}: give a text, or a list")
                yield "train", name, texts
                usable = line
    except UnicodeDecodeError as error:  # its position is that in a buffer
        whole = path.read_bytes().decode(errors="surrogateescape").split("\n")
        line = next(n for n, text in enumerate(whole, 1) if re.search("[\udc80-\udcff]", text))
        raise UserError(f"{path} line {line} is no UTF-8 ({error.reason}): save it so") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {line} is no JSON: {error.msg}") from None
    except csv.Error as error:
        raise UserError(f"{path} after line {usable}: {error}: put texts in quotes") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{path} line {line}: {what}") from None


def _column(row: dict, usual: set[str], setting: str) -> str:
    names = [name for name in row if name.lower() in usual]
    # The names of Hugging Face's imagefolder come before others.
    named = [name for name in names if name in ("file_name", "text")] or names
    if len(named) != 1:
        raise ValueError(
            f"the columns are {', '.join(row)}: name the one that is meant by {setting}, and "
            "separate columns by tabs or commas"
        )
    return named[0]


def _coco(path: Path) -> Rows:
    content = json.loads(path.read_text(encoding="utf-8"))
    if "annotations" in content:  # COCO's own captions_train2017.json
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            yield "train", files[annotation["image_id"]], [annotation["caption"]]
        return
    for image in content["images"]:  # Karpathy's splits
        file = os.path.join(image.get("filepath") or "", image["filename"])
        yield SPLITS[image["split"]], file, [sentence["raw"] for sentence in image["sentences"]]
