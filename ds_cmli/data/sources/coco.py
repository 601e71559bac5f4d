"""JSON that lists pictures and captions: Karpathy's splits of COCO and Flickr30k, COCO's own."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import read
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import EMPTY, Refused, told
from ds_cmli.data.sources.base import Parts, check_unicode, unused
from ds_cmli.data.sources.listed import LOOKED_AT, Listed, image_folder

# Karpathy's names; "restval", the rest of COCO's validation set, is usually trained on.
PARTS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
# The keys of both formats: those that are read, and those that say nothing of pictures or captions.
KNOWN = (
    *("images", "annotations", "filename", "filepath", "split", "sentences", "raw"),
    *("file_name", "id", "image_id", "caption", "dataset", "info", "licenses", "license", "type"),
    *("coco_url", "flickr_url", "date_captured", "height", "width", "url"),
    *("imgid", "sentid", "sentids", "cocoid", "tokens"),
)
EXPECTED = (
    'expected are Karpathy\'s {"images": [{"filename", "split", "sentences"}]} or COCO\'s '
    '{"images", "annotations"}'
)


class Row(NamedTuple):
    """A picture and one of its captions, or why they cannot be used."""

    split: str
    file: str  # or what else names the entry, if it has no file
    caption: str = ""
    reason: str = ""


def load_json(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open a JSON file; entries that cannot be used are left out.

    Raises:
        UserError: the file has neither of the two formats or no entry that can be used, or the
            images are not found.
    """
    if len(files) > 1:
        raise UserError(
            f"data.source is {name!r}, which are {len(files)} files: give each its own --data"
        )
    path = files[0]
    notices: list[str] = []
    rows, not_read = _read(path, notices, KNOWN)
    usable = [row.file for row in rows if not row.reason]
    if not usable:
        first = ", ".join(told([(row.file, row.reason) for row in rows]))
        first = f" (the first: {first})" if rows else ""
        raise UserError(f"{path} has no caption that can be used{first}: {EXPECTED}")
    # COCO keeps `captions_train2017.json` in annotations/, and the images in train2017/ next to it.
    subset = re.sub(r"^captions_", "", path.stem)
    subfolders = (subset, f"images/{subset}")
    folder = image_folder(path, usable[:LOOKED_AT], config, subfolders)
    parts: dict[str, Listed] = {}
    for row in rows:
        if row.split not in parts:
            parts[row.split] = Listed(f"{name} ({row.split})", folder, folder, config)
            parts[row.split].unused = not_read
        part = parts[row.split]
        if row.reason:
            part.bad.append((row.file, row.reason))
        else:
            part.add(row.file, row.caption)
    filled = {split: part for split, part in parts.items() if len(part)}
    first_part = next(iter(filled.values()))
    for split, part in parts.items():
        if split not in filled:
            first_part.bad += part.bad
    train = filled.get("train", first_part)
    return Parts(train, filled.get("validation"), filled.get("test"), notices)


def _read(path: Path, notices: list[str], known: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The rows, and the keys that are not `known`."""
    try:
        content = read(path, dict)
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): {EXPECTED}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    images, annotations = content.get("images"), content.get("annotations", [])
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UserError(f"{path} has not what it takes: {EXPECTED}")
    keys = dict(content)
    for item in (*images, *annotations):
        keys.update(_object(item))
        sentences = _object(item).get("sentences")
        if isinstance(sentences, list):
            for sentence in sentences:
                keys.update(_object(sentence))
    rows = _karpathy(images)
    if "annotations" in content:
        rows = _annotated(images, annotations, path, notices)
    return list(rows), unused("the keys", keys, known)


def _object(value: object) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    return {}


def _karpathy(images: list[object]) -> Iterator[Row]:
    """Yield the split, the file and the text of each caption."""
    for number, image in enumerate(images):
        split, file = "train", f"image {number}"
        try:
            name = _value(image, "split", str)
            split = PARTS.get(name, "train")
            folder = None
            if isinstance(image, dict) and "filepath" in image:
                folder = _value(image, "filepath", str | None)
            file = _file("/".join(filter(None, (folder, _value(image, "filename", str)))))
            if name not in PARTS:
                raise Refused(f"its split is {name!r}, none of {', '.join(PARTS)}")
            sentences = _value(image, "sentences", list)
            if not sentences:
                raise Refused(EMPTY)
        except Refused as error:
            yield Row(split, file, reason=str(error))
            continue
        for sentence in sentences:
            yield _row(split, file, sentence, "raw")


def _annotated(
    images: list[object], annotations: list[object], path: Path, notices: list[str]
) -> Iterator[Row]:
    """Yield the file and the text of each caption, all as the split "train"."""
    files: dict[str | int, str] = {}
    for number, image in enumerate(images):
        try:
            key, file = _value(image, "id", str | int), _file(_value(image, "file_name", str))
            if files.setdefault(key, file) != file:
                raise Refused(f"its id {key!r} is that of {files[key]!r}")
        except Refused as error:
            yield Row("train", f"image {number}", reason=str(error))
    used = set()
    for number, annotation in enumerate(annotations):
        try:
            key = _value(annotation, "image_id", str | int)
            if key not in files:
                raise Refused(f"no image has its image_id {key!r}")
        except Refused as error:
            yield Row("train", f"annotation {number}", reason=str(error))
            continue
        used.add(key)
        yield _row("train", files[key], annotation, "caption")
    without = [file for key, file in files.items() if key not in used]
    if without:
        notices.append(
            f"{len(without)} images of {path} have no annotation and are not used, the first: "
            f"{without[0]}"
        )


def _row(split: str, file: str, holder: object, key: str) -> Row:
    """The row of one caption, which is `holder[key]`."""
    caption: str | None = None
    try:
        caption = _value(holder, key, str | None)
        check_unicode(caption or "")
    except Refused as error:
        return Row(split, file, reason=str(error))
    if not caption or not caption.strip():
        return Row(split, file, reason=EMPTY)
    return Row(split, file, caption)


def _value(holder: object, key: str, wanted: type | UnionType) -> Any:
    """Return `holder[key]`; raises `Refused` if it has not, or not of the type `wanted`."""
    if not isinstance(holder, dict):
        raise Refused(f"no object but {type(holder).__name__}")
    if key not in holder:
        raise Refused(f"no {key!r}")
    value = holder[key]
    if not isinstance(value, wanted):
        raise Refused(f"its {key!r} is {type(value).__name__}")
    return value


def _file(name: str) -> str:
    """The name of an image's file; raises `Refused` if it is none inside a folder."""
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise Refused(f"{name!r} is no path inside a folder")
    check_unicode(name)
    return name
