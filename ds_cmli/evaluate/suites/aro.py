"""ARO (Yuksekgonul et al., ICLR 2023): captions against such with swapped or shuffled words.

VG-Relation and VG-Attribution are JSON lists of entries with `image_path`, the part of the picture
`bbox_x`, `bbox_y`, `bbox_w`, `bbox_h`, `true_caption`, `false_caption`, and `relation_name` or
`attributes`. COCO-Order and Flickr30k-Order are made by the authors' package, as entries with
`image` and `caption_options`, of which the first is the right one.
"""

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ds_cmli.common.lists import Entry, json_entries
from ds_cmli.config.schema import STRICT
from ds_cmli.evaluate.model import PictureFile
from ds_cmli.evaluate.suites.choices import Choices, Question, first_is_best
from ds_cmli.evaluate.suites.task import Measure

OPTIONS = 5  # captions of a case of COCO-Order and Flickr30k-Order
LEAST = 25  # cases of a pair of attributes that counts
# Relations whose swap stays true or hardly occurs: the authors' notebook leaves them out of the
# mean.
LEFT_OUT = Path(__file__).with_name("relations_left_out.txt")


class _VisualGenome(Choices):
    """Entries of a part of a picture with a right and a wrong caption."""

    chance: ClassVar[dict[str, float]] = {"mean": 1 / 2, "accuracy": 1 / 2}

    file: Path
    images: Path

    @abstractmethod
    def group(self, entry: Entry) -> str:
        """The category of an entry, by which accuracies are averaged."""

    @abstractmethod
    def counted(self, groups: list[str]) -> np.ndarray:
        """Whether each question's category counts for the mean: bool [n]."""

    @cached_property
    def questions(self) -> list[Question]:
        out = []
        for entry in json_entries(self.file):
            x, y, width, height = (entry.get(f"bbox_{side}", int) for side in "xywh")
            if width < 1 or height < 1:
                entry.wrong(f"its box has {width} x {height} pixels")
            picture = PictureFile(
                entry.picture("image_path", self.images), (x, y, x + width, y + height)
            )
            captions = entry.text("true_caption"), entry.text("false_caption")
            out.append(Question((picture,), captions, self.group(entry)))
        return out

    def measures(self, i2t: Tensor, t2i: Tensor) -> dict[str, Measure]:
        """`mean`, the mean accuracy over categories, as published, and `accuracy` over all cases.

        A tie is no hit.
        """
        right = first_is_best(i2t[:, 0])
        groups = self.groups
        counted = torch.from_numpy(self.counted(groups))
        out = {"accuracy": Measure.accuracy(right)}
        if counted.any():
            out["mean"] = Measure.mean_of_groups(right, groups, counted)
        return out


@dataclass(config=STRICT, frozen=True)
class VGRelation(_VisualGenome):
    file: Path  # visual_genome_relation.json
    images: Path

    def group(self, entry: Entry) -> str:
        return entry.text("relation_name")

    def counted(self, groups: list[str]) -> np.ndarray:
        return ~np.isin(groups, LEFT_OUT.read_text().splitlines())


@dataclass(config=STRICT, frozen=True)
class VGAttribution(_VisualGenome):
    file: Path  # visual_genome_attribution.json
    images: Path

    def group(self, entry: Entry) -> str:
        attributes = entry.texts("attributes")
        if len(attributes) != 2:
            entry.wrong(f"its 'attributes' are {attributes!r}, and two are needed")
        return "_".join(attributes)

    def counted(self, groups: list[str]) -> np.ndarray:
        _, number, cases = np.unique(groups, return_inverse=True, return_counts=True)
        return cases[number] >= LEAST


@dataclass(config=STRICT, frozen=True)
class Order(Choices):
    chance: ClassVar[dict[str, float]] = {"accuracy": 1 / OPTIONS}
    file: Path  # a list of {"image", "caption_options"}
    images: Path

    @cached_property
    def questions(self) -> list[Question]:
        out = []
        for entry in json_entries(self.file):
            picture = PictureFile(entry.picture("image", self.images))
            options = tuple(entry.texts("caption_options"))
            if len(options) != OPTIONS:
                entry.wrong(f"its 'caption_options' are {len(options)}, and {OPTIONS} are needed")
            out.append(Question((picture,), options))
        return out

    def measures(self, i2t: Tensor, t2i: Tensor) -> dict[str, Measure]:
        """The accuracy; the first of equal scores is chosen, as published."""
        return {"accuracy": Measure.accuracy((i2t[:, 0, :1] >= i2t[:, 0, 1:]).all(1))}
