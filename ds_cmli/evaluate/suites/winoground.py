"""Winoground (Thrush et al., CVPR 2022) and ColorSwap (Burapacheep et al., 2024).

Each example has two pictures and two captions of the same words. Winoground is `examples.jsonl`,
with `image_0`, `image_1`, `caption_0` and `caption_1`, and pictures `images/<image_0>.png`;
ColorSwap is a JSON list with `image_1`, `image_2`, `caption_1` and `caption_2`, whose paths begin
with `images/`.
"""

from functools import cached_property
from pathlib import Path

from pydantic.dataclasses import dataclass
from torch import Tensor

from ds_cmli.config.schema import STRICT
from ds_cmli.evaluate.model import PictureFile
from ds_cmli.evaluate.suites.choices import Choices, Question
from ds_cmli.evaluate.suites.files import json_entries, json_lines
from ds_cmli.evaluate.suites.task import Measure


class _TwoByTwo(Choices):
    def measures(self, i2t: Tensor, t2i: Tensor) -> dict[str, Measure]:
        """`text`, `image` and `group`: the share of examples in which all choices are right.

        Those of a caption for each picture, of a picture for each caption, and both; a tie is
        wrong.
        """
        text = (i2t[:, 0, 0] > i2t[:, 0, 1]) & (i2t[:, 1, 1] > i2t[:, 1, 0])
        image = (t2i[:, 0, 0] > t2i[:, 1, 0]) & (t2i[:, 1, 1] > t2i[:, 0, 1])
        hits = {"text": text, "image": image, "group": text & image}
        return {name: Measure.accuracy(right) for name, right in hits.items()}


@dataclass(config=STRICT, frozen=True)
class Winoground(_TwoByTwo):
    file: Path  # examples.jsonl
    images: Path

    @cached_property
    def questions(self) -> list[Question]:
        out = []
        for entry in json_lines(self.file):
            files = [entry.picture(f"image_{k}", self.images, ".png") for k in (0, 1)]
            captions = entry.text("caption_0"), entry.text("caption_1")
            out.append(Question((PictureFile(files[0]), PictureFile(files[1])), captions))
        return out


@dataclass(config=STRICT, frozen=True)
class ColorSwap(_TwoByTwo):
    file: Path  # test.json
    images: Path  # the folder that has images/

    @cached_property
    def questions(self) -> list[Question]:
        out = []
        for entry in json_entries(self.file):
            files = [entry.picture(f"image_{k}", self.images) for k in (1, 2)]
            captions = entry.text("caption_1"), entry.text("caption_2")
            out.append(Question((PictureFile(files[0]), PictureFile(files[1])), captions))
        return out
