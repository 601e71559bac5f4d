"""Boxes of COCO's annotations (Lin et al., 2014), which LVIS has too, with the classes in them.

`{"images": [{"id", "width", "height", "file_name" or "coco_url"}], "categories": [{"id", "name"}],
"annotations": [{"image_id", "category_id", "bbox": [left, top, width, height], "iscrowd"}]}`, of
which the last is not needed.
"""

import math
from collections.abc import Container, Iterator
from typing import NamedTuple

from ds_cmli.common.lists import Entry
from ds_cmli.data.transforms import PixelBox


class Picture(NamedTuple):
    name: str  # of its file, or LVIS's address of it
    size: tuple[int, int]  # width and height


class Annotation(NamedTuple):
    entry: Entry
    picture: int  # its number in the file
    box: PixelBox  # which may have no area, or lie outside of the picture
    label: int  # the class, by its place in `CocoBoxes.names`


class CocoBoxes:
    """The classes, in the order of their numbers, and the pictures by theirs."""

    def __init__(self, whole: Entry):
        """Raises `UserError` for an object of another format."""
        self.whole = whole
        names: dict[int, str] = {}
        for entry in whole.entries("categories"):
            # LVIS's names have underscores.
            names[_new(entry, names)] = entry.text("name").replace("_", " ")
        names = dict(sorted(names.items()))
        self.names = list(names.values())
        self.labels = dict(zip(names, range(len(names)), strict=True))
        self.pictures: dict[int, Picture] = {}
        for entry in whole.entries("images"):
            name = entry.text("file_name" if "file_name" in entry.keys else "coco_url")
            size = entry.get("width", int), entry.get("height", int)
            self.pictures[_new(entry, self.pictures)] = Picture(name, size)

    def annotations(self) -> Iterator[Annotation]:
        """Yields the boxes of single objects, and none around many. Raises `UserError`."""
        for entry in self.whole.entries("annotations"):
            picture = _known(entry, "image_id", self.pictures)
            label = self.labels[_known(entry, "category_id", self.labels)]
            if not ("iscrowd" in entry.keys and entry.get("iscrowd", int)):
                yield Annotation(entry, picture, _box(entry), label)


def _new(entry: Entry, before: Container[int]) -> int:
    """The number of an entry, unlike those before. Raises `UserError`."""
    key = entry.get("id", int)
    if key in before:
        entry.wrong(f"its 'id' {key} is that of another")
    return key


def _known(entry: Entry, key: str, known: Container[int]) -> int:
    """The number that an entry has under `key`, which is one of these. Raises `UserError`."""
    number = entry.get(key, int)
    if number not in known:
        entry.wrong(f"its {key!r} is {number}, which is not in the file")
    return number


def _box(entry: Entry) -> PixelBox:
    values = entry.get("bbox", list)
    numbers = set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))
    if len(values) != 4 or not numbers:
        entry.wrong(f"its bbox is {values}, and four numbers are needed")
    left, top, wide, high = values
    return left, top, left + wide, top + high
