"""Winoground (Thrush et al., CVPR 2022) and ColorSwap (Burapacheep et al., 2024).

Each example has two pictures and two captions of the same words. Winoground is `examples.jsonl`,
with `image_0`, `image_1`, `caption_0` and `caption_1`, and pictures `images/<image_0>.png`;
ColorSwap is a JSON list with `image_1`, `image_2`, `caption_1` and `caption_2`, whose paths begin
with `images/`.
"""

from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from ds_cmli.common.lists import Entry, json_entries, json_lines
from ds_cmli.config.schema import STRICT
from ds_cmli.evaluate.model import PictureFile
from ds_cmli.evaluate.suites.choices import Choices, Question
from ds_cmli.evaluate.suites.task import Measure


class _TwoByTwo(Choices):
    """Settings are `file` and `images`."""

    chance: ClassVar[dict[str, float]] = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}

    images: Path

    def question(self, entry: Entry, sides: tuple[int, int], suffix: str = "") -> Question:
        files, captions = [], []
        for side in sides:
            files.append(PictureFile(entry.picture(f"image_{side}", self.images, suffix)))
            captions.append(entry.text(f"caption_{side}"))
        return Question(tuple(files), tuple(captions))

    def measures(self, i2t: Tensor, t2i: Tensor) -> dict[str, Measure]:
        """`text`, `image` and `group`: the share of examples in which all choices are right.

        Those of a caption for each picture, of a picture for each caption, and both; a tie is
        wrong.
        """
        text = (i2t[:, 0, 0] > i2t[:, 0, 1]) & (i2t[:, 1, 1] > i2t[:, 1, 0])
        image = (t2i[:, 0, 0] > t2i[:, 1, 0]) & (t2i[:, 1, 1] > t2i[:, 0, 1])
        names = ("text", "image", "group")
        return dict(zip(names, map(Measure.accuracy, (text, image, text & image)), strict=True))


@dataclass(config=STRICT, frozen=True)
class Winoground(_TwoByTwo):
    file: Path  # examples.jsonl
    images: Path

    @cached_property
    def questions(self) -> list[Question]:
        return [self.question(entry, (0, 1), ".png") for entry in json_lines(self.file)]


@dataclass(config=STRICT, frozen=True)
class ColorSwap(_TwoByTwo):
    file: Path  # test.json
    images: Path  # the folder that has images/

    @cached_property
    def questions(self) -> list[Question]:
        return [self.question(entry, (1, 2)) for entry in json_entries(self.file)]
