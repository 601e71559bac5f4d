"""Lists of image files with captions: CSV, TSV, JSON lines, COCO's and Karpathy's JSON."""

import csv
import hashlib
import json
import os
import pickle
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import read_image_file
from ds_cmli.data.sources import PART_OF_SPLIT, Caption, Source, find_column
from ds_cmli.errors import UserError, blame, nearest, one_line

METADATA = ("metadata.csv", "metadata.jsonl")
ITEMS_OF_BLOCK = 64  # a block is unpacked to read one of them, in 20 microseconds
NUM_PROBED = 100  # images of a list that are looked for in a folder: the first may be missing
Rows = Iterator[tuple[str, str, list[str | None], str]]  # part, image file, captions, column


class Packed:
    """A list of objects in compressed blocks, in one buffer that forked processes share."""

    def __init__(self, items: Iterable[object]):
        self.length = 0
        self.buffer = bytearray()
        self.digest = hashlib.blake2b(digest_size=16)  # of the pickles of all items
        ends = [0]
        iterator = iter(items)
        while block := list(islice(iterator, ITEMS_OF_BLOCK)):
            for item in block:
                self.digest.update(pickle.dumps(item, -1))
            self.length += len(block)
            self.buffer += zlib.compress(pickle.dumps(block, -1), level=1)
            ends.append(len(self.buffer))
        self.ends = np.array(ends)
        self.block = lru_cache(1)(self._block)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        number, place = divmod(index, ITEMS_OF_BLOCK)
        return self.block(number)[place]

    def _block(self, number: int) -> list[Any]:
        content = memoryview(self.buffer)[self.ends[number] : self.ends[number + 1]]
        return pickle.loads(zlib.decompress(content))


class ListedImages:
    """Images in files, with the captions that a list gives them."""

    def __init__(self, root: Path, captions: dict[str, list[Caption]], columns: set[str]):
        self.root = root
        self.columns = columns  # of the list, if `data.caption_weights` is given
        self.rows = Packed((file, texts) for file, texts in captions.items() if texts)
        self.left_out = len(captions) - len(self.rows)  # images without a caption

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> bytes:
        return read_image_file(self.root / self.name(index))

    def captions(self, index: int) -> Sequence[Caption]:
        _, captions = self.rows[index]
        return captions

    def name(self, index: int) -> str:
        file, _ = self.rows[index]
        return file

    def fingerprint(self) -> dict[str, object]:
        return {"images": len(self), "content": self.rows.digest.hexdigest()}


def open_folder(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open a folder with a metadata.csv or .jsonl, or with such folders train/ and validation/."""
    (folder,) = files
    parts: dict[str, Source] = {}
    for name, part in {"": "train", **PART_OF_SPLIT}.items():
        lists = [file for metadata in METADATA for file in (folder / name).glob(metadata)]
        if len(lists) + (part in parts) > 1:
            raise UserError(f"{folder} has several lists, as {lists[-1]}: keep one for {part}")
        if lists:
            parts |= {part: _group(_read_table(lists[0], config), lists[0], config)["train"]}
    return parts


def open_tables(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open CSV, TSV or JSON lines; all rows with one image file are captions of one image."""
    rows = chain.from_iterable(_read_table(file, config) for file in files)
    return _group(rows, files[0], config)


def open_json(files: list[Path], config: DataConfig) -> dict[str, Source]:
    """Open COCO's annotations, or Karpathy's splits of COCO or Flickr30k."""
    if len(files) > 1:
        raise UserError(f"{files[0]} and {len(files) - 1} others: give each its own --data")
    with blame(f"{files[0]} is no list of captions as COCO's or Karpathy's"):
        return _group(_read_json(files[0]), files[0], config)


def _group(rows: Rows, path: Path, config: DataConfig) -> dict[str, Source]:
    """Return the images of each part, with all their captions."""
    captions: dict[str, dict[str, list[Caption]]] = {}
    columns: set[str] = set()
    for part, file, texts, column in rows:
        columns.add(column)
        image_captions = captions.setdefault(part, {}).setdefault(os.path.normpath(file), [])
        for text in texts:
            if not isinstance(text, str | None):
                raise UserError(f"{path}: a caption of {file} is {text!r}: give a text")
            if text and text.strip():
                image_captions.append((column, text) if config.caption_weights else text)
    if not captions:
        raise UserError(f"{path} has no row: give each image a file name and a caption")
    probed = list(islice(chain.from_iterable(captions.values()), NUM_PROBED))
    root = _image_folder(probed, path, config.image_root)
    return {part: ListedImages(root, images, columns) for part, images in captions.items()}


def _image_folder(names: list[str], path: Path, image_root: str) -> Path:
    """Return the folder that has one of the images; `path` is that of their list."""
    # COCO keeps captions_train2017.json in annotations/, and the images in train2017/ next to it.
    subset = path.stem.removeprefix("captions_")
    roots = [path.parent, path.parent.parent]
    if image_root:
        roots = [Path(os.path.expanduser(image_root))]
    for root in roots:
        for folder in (root, root / "images", root / subset, root / "images" / subset):
            if any((folder / name).exists() for name in names):
                return folder
    problem = f"{path} names the image {names[0]!r}, which is not in {roots[0]}"
    raise UserError(f"{problem}: give its folder by --image-root")


def _read_table(path: Path, config: DataConfig) -> Rows:
    """Yield the rows of a CSV, TSV or JSON lines; an error names the line."""
    image_key = config.image_key
    caption_keys = list(config.caption_weights or filter(None, [config.caption_key]))
    line = last_row = 0

    def lines() -> Iterator[str]:
        nonlocal line
        for text in file:
            line += 1
            text.encode()  # an error if a byte was no UTF-8
            yield text

    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows: Iterable[dict] = map(json.loads, filter(str.strip, lines()))
            if path.suffix.lower() != ".jsonl":
                separator = "\t" if "\t" in file.readline() else ","
                file.seek(0)
                rows = csv.DictReader(lines(), delimiter=separator, strict=True)
            for row in rows:
                if isinstance(rows, csv.DictReader) and (None in row or None in row.values()):
                    raise ValueError("not as many cells as line 1 has: put texts in quotes")
                image_key = image_key or find_column(row, "image")
                if not caption_keys:
                    caption_keys = [find_column(row, "caption")]
                columns = list(getattr(rows, "fieldnames", ()))
                for key in (image_key, *caption_keys):
                    # A line of JSON may lack some of the weighted columns.
                    if key not in row and (columns or not config.caption_weights):
                        raise ValueError(f"there is no column {key!r}: {nearest(key, row)}")
                    if columns.count(key) > 1:
                        raise ValueError(f"line 1 has the column {key} more than once")
                name = row[image_key]
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{image_key} is {name!r}: give the image's path")
                for key in caption_keys:
                    value = row.get(key)
                    texts = value if isinstance(value, list) else [value]
                    if not all(text is None or isinstance(text, str) for text in texts):
                        raise ValueError(f"{key} is {value!r}: give a text, or a list")
                    yield "train", name, texts, key
                if config.caption_weights:  # a message names the columns that there are
                    for key in row.keys() - {*caption_keys}:
                        yield "train", name, [], key
                last_row = line
    except UnicodeEncodeError:
        raise UserError(f"{path} line {line} is no UTF-8: save it so") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {line} is no JSON: {error.msg}") from None
    except csv.Error as error:
        advice = "put texts in quotes"
        if "limit" in str(error):
            advice = "a quote is not closed, or the text is longer"
        raise UserError(f"{path} after line {last_row}: {error}: {advice}") from None
    except RecursionError:
        raise UserError(f"{path} line {line}: nested too deeply") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} line {line}: {one_line(error)}") from None


def _read_json(path: Path) -> Rows:
    content = json.loads(path.read_text(encoding="utf-8"))
    if "annotations" in content:  # COCO's own captions_train2017.json
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            yield "train", files[annotation["image_id"]], [annotation["caption"]], ""
        return
    for image in content["images"]:  # Karpathy's splits
        file = os.path.join(image.get("filepath") or "", image["filename"])
        captions = [sentence["raw"] for sentence in image["sentences"]]
        yield PART_OF_SPLIT[image["split"]], file, captions, ""
