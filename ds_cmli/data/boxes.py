"""Boxes with phrases of pictures (`data.boxes`), and which of them a view of a picture shows.

Three published formats are read. Flickr30k Entities (Plummer et al., 2015): a folder with
`Annotations/ID.xml`, the boxes of numbered entities, and `Sentences/ID.txt`, captions such as
`[/EN#5/people Two men] on [/EN#6/vehicles a boat]`. COCO (Lin et al., 2014): the JSON object of
`coco_boxes.py`, whose classes' names are the phrases. Visual Genome (Krishna et
al., 2017): a JSON list of pictures with their "regions". A picture is known by the name of its file
without folder and suffix, in Visual Genome by its id.
"""

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject, read
from ds_cmli.common.lists import Entry
from ds_cmli.data.coco_boxes import CocoBoxes
from ds_cmli.data.sources.base import sampled
from ds_cmli.data.sources.listed import Strings
from ds_cmli.data.transforms import Box, PixelBox

ShareBox = tuple[float, float, float, float]  # the same as shares of a view's width and height
PHRASE = re.compile(r"\[/EN#(\d+)\S* ([^\]]*)\]")


@dataclass
class Phrase:
    start: int  # first character in the caption
    end: int  # one after its last character
    number: str  # the number of its entity


def parse_sentence(line: str) -> tuple[str, list[Phrase]]:
    """The caption without its markup, and its phrases."""
    text, phrases, last = "", [], 0
    for match in PHRASE.finditer(line):
        text += line[last : match.start()]
        phrases.append(Phrase(len(text), len(text) + len(match[2]), match[1]))
        text += match[2]
        last = match.end()
    return text + line[last:], phrases


def parse_annotation(text: str) -> tuple[tuple[int, int], dict[str, list[PixelBox]]]:
    """Width and height of the picture, and the boxes of each entity that has any."""
    root = ElementTree.fromstring(text)
    boxes: dict[str, list[PixelBox]] = {}
    for item in root.iter("object"):
        box = item.find("bndbox")
        if box is not None:
            sides = ("xmin", "ymin", "xmax", "ymax")
            left, top, right, bottom = (float(box.findtext(side, "")) for side in sides)
            for name in item.findall("name"):
                boxes.setdefault(str(name.text), []).append((left, top, right, bottom))
    return (int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))), boxes


class Boxed(NamedTuple):
    """A box with its phrase."""

    picture: str  # the name of its file, without folder and suffix
    size: tuple[float, float]  # width and height of the picture in which it is; 0: the file's own
    box: PixelBox
    phrase: str


class Boxes:
    """The boxes of a file or a folder, by picture, in arrays that forked processes share."""

    def __init__(self, path: str):
        """Raises `UserError` if it has another format, or no box with a phrase."""
        place = Path(path).expanduser()
        self.path, self.phrases = path, Strings()
        keys, numbers = array("Q"), array("d")
        self.left_out = 0  # boxes without an area or a phrase
        try:
            for entry in _entries(place):
                left, top, right, bottom = entry.box
                if not (left < right and top < bottom and entry.phrase.strip()):
                    self.left_out += 1
                    continue
                keys.append(_key(entry.picture))
                numbers.extend((*entry.size, *entry.box))
                self.phrases.append(entry.phrase.strip())
            self.fingerprint = {"boxes": len(keys), "content": sampled(_files(place))}
        except UserError as error:
            raise UserError(f"data.boxes: {error}") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError) as error:
            raise UserError(
                f"data.boxes is {path!r}, which cannot be read ({type(error).__name__}: {error}): "
                "give Flickr30k Entities' folder, or a JSON of COCO's annotations or of Visual "
                "Genome's regions"
            ) from None
        if not keys:
            raise UserError(f"data.boxes is {path!r}, which has no box with a phrase: give another")
        unsorted = np.frombuffer(keys, np.uint64)
        self.order = unsorted.argsort(kind="stable")
        self.keys = unsorted[self.order]
        self.numbers = np.frombuffer(numbers, np.float64).reshape(-1, 6)  # size and box

    def of(self, name: str) -> list[Boxed]:
        """The boxes of a picture, given its file's name, which may have a folder and a suffix."""
        picture = PurePosixPath(name).stem
        key = np.uint64(_key(picture))
        first, last = np.searchsorted(self.keys, np.stack([key, key + np.uint64(1)]))
        out = []
        for row in self.order[first:last].tolist():
            width, height, left, top, right, bottom = self.numbers[row].tolist()
            sides = left, top, right, bottom
            out.append(Boxed(picture, (width, height), sides, self.phrases[row]))
        return out


def _key(picture: str) -> int:
    """A hash of 63 bits, so that the next number fits into 64 too."""
    digest = hashlib.blake2b(picture.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    return sorted([*place.glob("Annotations/*.xml"), *place.glob("Sentences/*.txt")])


def _entries(place: Path) -> Iterator[Boxed]:
    """Raises nearly any exception for damaged data."""
    if place.is_dir():
        yield from _entities(place)
        return
    content: Any = read(place, object, finite=True)
    if isinstance(content, dict):
        yield from _coco(Entry(place, "its object", content))
    else:
        yield from _visual_genome(content)


def _entities(folder: Path) -> Iterator[Boxed]:
    """Each phrase once, with the box around those of its entity."""
    files = sorted(folder.glob("Annotations/*.xml"))
    if not files:
        raise FileNotFoundError("it has no Annotations/*.xml")
    for file in files:
        size, boxes = parse_annotation(file.read_text(encoding="utf-8"))
        known: set[tuple[str, str]] = set()
        sentences = (folder / "Sentences" / f"{file.stem}.txt").read_text(encoding="utf-8")
        for line in sentences.splitlines():
            text, phrases = parse_sentence(line)
            for phrase in phrases:
                words = text[phrase.start : phrase.end]
                if phrase.number in boxes and (phrase.number, words) not in known:
                    known.add((phrase.number, words))
                    left, top, right, bottom = zip(*boxes[phrase.number], strict=True)
                    around = min(left), min(top), max(right), max(bottom)
                    yield Boxed(file.stem, size, around, words)


def _coco(whole: Entry) -> Iterator[Boxed]:
    """The box of each object with the name of its category; none around many objects."""
    coco = CocoBoxes(whole)
    for annotation in coco.annotations():
        picture = coco.pictures[annotation.picture]
        name, phrase = PurePosixPath(picture.name).stem, coco.names[annotation.label]
        yield Boxed(name, picture.size, annotation.box, phrase)


def _visual_genome(content: list[JsonObject]) -> Iterator[Boxed]:
    for picture in content:
        for entry in picture["regions"]:
            left, top = entry["x"], entry["y"]
            box = left, top, left + entry["width"], top + entry["height"]
            number = entry.get("image_id", picture.get("image_id", picture.get("id")))
            yield Boxed(str(number), (0, 0), box, str(entry["phrase"]))


def in_view(boxed: Boxed, size: tuple[int, int], view: Box, flipped: bool) -> ShareBox | None:
    """The part of a box that a view shows, as shares of its sides; None: it is cut away.

    Args:
        size: the picture's width and height in pixels.
        view: the part of the picture that is shown.
        flipped: whether it is shown mirrored, left for right.
    """
    shares = []
    for axis in (0, 1):
        scale = size[axis] / boxed.size[axis] if boxed.size[axis] else 1.0
        start, end = view[axis], view[axis + 2]
        for side in (boxed.box[axis], boxed.box[axis + 2]):
            share = (side * scale - start) / (end - start)
            shares.append(min(1.0, max(0.0, share)))
    left, right, top, bottom = shares
    if left >= right or top >= bottom:
        return None
    if flipped:
        left, right = 1 - right, 1 - left
    return left, top, right, bottom
