"""Zero-shot segmentation: each pixel's class is the one whose text fits the patches there best.

The cosines of patches and class texts are resized bilinearly to the mask, as MaskCLIP (Zhou et al.,
ECCV 2022) and SCLIP (Wang et al., ECCV 2024) do. The mean intersection over union is
mmsegmentation's: both areas are summed over all pictures, and the mean is over the classes that a
mask or a prediction has.

Shapes: n pictures, Q names of C classes.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice, repeat
from operator import attrgetter
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.common.lists import Entry, text_lines
from ds_cmli.config.schema import STRICT
from ds_cmli.data.transforms import Box
from ds_cmli.evaluate.model import EvaluatedModel
from ds_cmli.evaluate.suites.class_texts import Templates, class_vectors, prompts
from ds_cmli.evaluate.suites.dense import Part, areas, parts, predicted, seeing_whole, windows
from ds_cmli.evaluate.suites.masks import IGNORED, Labelled
from ds_cmli.evaluate.suites.task import Measure, Measured

SCALE = 100.0  # 1/temperature of scores that no loss compares: the highest of CLIP's


@dataclass(config=STRICT, frozen=True)
class Segmentation:
    data: Path  # the folder of the data set
    split: str = ""  # "": its validation part
    # A line for each class, `name, another name`, instead of the published ones. With `background`
    # the first line may be of the background.
    classes: Path | None = None
    templates: Templates = "openai"
    # Without it, pixels of no class do not count. With it, they are a class of their own, which
    # those pixels get whose best name has a lower probability.
    background: Annotated[float, Field(gt=0, lt=1)] | None = None
    # 0: the model sees the whole picture at once. Otherwise it sees squares of its own size, each
    # half a side from the next, of the picture with so many pixels along its shorter side.
    shorter_side: Annotated[int, Field(ge=0, le=16384)] = 0

    validation: ClassVar[str]
    no_class: ClassVar[int]  # the value of pixels of no class
    ignored: ClassVar[tuple[int, ...]] = ()  # values of pixels that never count

    @cached_property
    def published(self) -> dict[int, str]:
        """The names of each class, by its value in masks. Raises `UserError`."""
        raise NotImplementedError

    def labelled(self, part: str) -> list[Labelled]:
        """The pictures of a part. Raises `UserError` if there is none."""
        raise NotImplementedError

    def read(self) -> None:
        """Read the lists, and the size of each picture and mask. Raises `UserError`."""
        _ = self.pictures, self.names, prompts(self.templates)

    @cached_property
    def pictures(self) -> list[tuple[Labelled, tuple[int, int]]]:
        """Each picture with its width and height."""
        shown = self.labelled(self.split or self.validation)
        return list(zip(shown, map(Labelled.size, shown), strict=True))

    @property
    def numbers(self) -> dict[int, int]:
        """The class of each value in masks, from 0 on; the background is class 0."""
        values = list(self.published)
        if self.background is not None:
            values.insert(0, self.no_class)
        ignored = dict.fromkeys((*self.ignored, self.no_class), IGNORED)
        return ignored | dict(zip(values, range(len(values)), strict=True))

    @cached_property
    def names(self) -> tuple[list[str], Tensor]:
        """All names of the classes, and the class of each: int64 [Q]. Raises `UserError`."""
        rows, first = list(self.published.values()), int(self.background is not None)
        if self.classes is not None:
            count, rows = len(rows), list(text_lines(self.classes).values())
            if len(rows) == count + first:
                first = 0
            elif len(rows) != count:
                raise UserError(
                    f"{self.classes} has {len(rows)} lines: give one for each of {count} classes"
                )
        names: list[str] = []
        class_of: list[int] = []
        for number, row in enumerate(rows, first):
            of_row = list(filter(None, map(str.strip, row.split(","))))
            if not of_row:
                raise UserError(f"{self.classes} has {row!r} where a class's name is needed")
            names += of_row
            class_of += [number] * len(of_row)
        return names, torch.tensor(class_of)

    @torch.no_grad()
    def run(self, model: EvaluatedModel) -> Measured:
        """Segment all pictures: `<score>/miou`, and `<score>/pixel_accuracy` of all pixels."""
        names, class_of = self.names
        vectors = class_vectors(model, names, prompts(self.templates))
        class_of, classes = class_of.to(model.how.device), max(self.numbers.values()) + 1
        counted: dict[str, list[Tensor]] = defaultdict(list)
        for (picture, size), shown in zip(self.pictures, self._parts(model), strict=True):
            mask = picture.classes(self.numbers).to(model.how.device)
            for kind, of_kind in vectors.items():
                scale, least = model.scales.get(kind, SCALE), self.background or 0.0
                pixels = predicted(shown, size, of_kind, class_of, scale, least)
                counted[kind].append(areas(pixels, mask, classes).cpu())  # CPU-GPU sync
        measures = {}
        for kind, of_pictures in counted.items():
            both, ours, theirs = torch.stack(of_pictures, 1).double()  # [n, C] each
            if not theirs.any():
                raise UserError(f"{self.data}: no mask has a pixel of a class: give another split")
            measures[f"{kind}/miou"] = Measure(both, ours + theirs - both)
            of_all = both.sum(1, keepdim=True), theirs.sum(1, keepdim=True)
            measures[f"{kind}/pixel_accuracy"] = Measure(*of_all)
        return Measured(len(self.pictures), measures, {"classes": classes})

    def _parts(self, model: EvaluatedModel) -> Iterator[list[Part]]:
        """Yield what the model sees of each picture."""
        side = model.config.data.image_size
        if 0 < self.shorter_side < side:
            raise UserError(
                f"shorter_side is {self.shorter_side}, and {model.name} takes {side} pixels: give "
                "at least these, or 0"
            )
        views: list[tuple[Path, Box]] = []
        counts = []
        for picture, size in self.pictures:
            boxes: list[Box] = [(0, 0, *size)]
            if self.shorter_side:
                boxes = windows(size, min(size) * side / self.shorter_side)
            views += zip(repeat(picture.picture), boxes)
            counts.append(len(boxes))
        shown = parts(seeing_whole(model), views)
        for count in counts:
            yield list(islice(shown, count))


@dataclass(config=STRICT, frozen=True)
class VOC(Segmentation):
    """PASCAL VOC 2012: the folder VOC2012 with JPEGImages, SegmentationClass and ImageSets."""

    validation, no_class, ignored = "val", 0, (255,)  # 255: the borders of objects

    @cached_property
    def published(self) -> dict[int, str]:
        names = (
            *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
            *("cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant"),
            *("sheep", "sofa", "train", "tv monitor"),
        )
        return dict(enumerate(names, 1))

    def labelled(self, part: str) -> list[Labelled]:
        names = text_lines(self.data / "ImageSets" / "Segmentation" / f"{part}.txt").values()
        return in_folders(self.data / "JPEGImages", self.data / "SegmentationClass", names)


@dataclass(config=STRICT, frozen=True)
class ADE20K(Segmentation):
    """ADE20K of SceneParsing: the folder ADEChallengeData2016, with names in objectInfo150.txt."""

    validation, no_class = "validation", 0

    @cached_property
    def published(self) -> dict[int, str]:
        return numbered(self.data / "objectInfo150.txt", "\t", range(1, 151), heading=1)

    def labelled(self, part: str) -> list[Labelled]:
        return of_all_masks(self.data, part)


@dataclass(config=STRICT, frozen=True)
class COCOStuff(Segmentation):
    """COCO-Stuff: images/, annotations/ and labels.txt of https://github.com/nightrome/cocostuff.

    Masks have the numbers of labels.txt less 1; 11 of its 182 classes are in no mask.
    """

    validation, no_class = "val2017", 255

    @cached_property
    def published(self) -> dict[int, str]:
        names = numbered(self.data / "labels.txt", ": ", range(183))
        without = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
        return {number - 1: names[number] for number in names if number not in without}

    def labelled(self, part: str) -> list[Labelled]:
        return of_all_masks(self.data, part)


def numbered(file: Path, separator: str, numbers: range, heading: int = 0) -> dict[int, str]:
    """The names in a file whose rows begin with these numbers and end with a name, by number.

    `heading`: how many rows there are before them. Raises `UserError`.
    """
    rows = dict(islice(text_lines(file).items(), heading, None))
    if len(rows) != len(numbers):
        raise UserError(f"{file} has {len(rows)} rows of {len(numbers)}: fetch it again")
    names = {}
    for number, place in zip(numbers, rows, strict=True):
        line = rows[place]
        first, _, rest = line.partition(separator)
        names[number] = rest.rpartition(separator)[2].strip()
        if first.strip() != str(number) or not names[number]:
            problem = f"{line!r} where number {number} and a name are needed"
            Entry(file, f"line {place}", line).wrong(problem)
    return names


def in_folders(pictures: Path, masks: Path, names: Iterable[str]) -> list[Labelled]:
    return [Labelled(pictures / f"{name}.jpg", masks / f"{name}.png") for name in names]


def of_all_masks(data: Path, part: str) -> list[Labelled]:
    """The pictures images/PART/NAME.jpg of masks annotations/PART/NAME.png. Raises `UserError`."""
    folder = data / "annotations" / part
    names = sorted(map(attrgetter("stem"), folder.glob("*.png")))
    if not names:
        raise UserError(f"{data} has no mask annotations/{part}/NAME.png: fetch them")
    return in_folders(data / "images" / part, folder, names)
