"""SugarCrepe (Hsieh et al., NeurIPS 2023): a COCO picture's caption against one wrong caption.

Published are seven files of entries `{"0": {"filename", "caption", "negative_caption"}, ...}`, one
for each way in which captions were made wrong: add_obj, add_att, replace_obj, replace_att,
replace_rel, swap_obj and swap_att.
"""

from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from ds_cmli.common.lists import files_in, json_entries
from ds_cmli.config.schema import STRICT
from ds_cmli.evaluate.model import PictureFile
from ds_cmli.evaluate.suites.choices import Choices, Question, first_is_best
from ds_cmli.evaluate.suites.task import Measure


@dataclass(config=STRICT, frozen=True)
class SugarCrepe(Choices):
    chance: ClassVar[dict[str, float]] = {"mean": 1 / 2}
    files: Path  # the folder of the JSON files
    images: Path  # COCO's val2017

    @cached_property
    def questions(self) -> list[Question]:
        out = []
        for file in files_in(self.files, ".json"):
            for entry in json_entries(file):
                picture = PictureFile(entry.picture("filename", self.images))
                captions = entry.text("caption"), entry.text("negative_caption")
                out.append(Question((picture,), captions, file.stem))
        return out

    def measures(self, i2t: Tensor, t2i: Tensor) -> dict[str, Measure]:
        """The accuracy of each file, and `mean`, their mean; a tie is no hit, as published."""
        right = first_is_best(i2t[:, 0])
        groups = self.groups
        return {"mean": Measure.mean_of_groups(right, groups), **Measure.by_group(right, groups)}
