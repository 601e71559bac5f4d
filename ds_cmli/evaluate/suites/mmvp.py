"""MMVP-VLM (Tong et al., CVPR 2024): pairs of pictures that CLIP takes for alike.

`Questions.csv` has a row for each picture: its number, its visual pattern, and a statement. Rows 1
and 2 are a pair, and so on. The pictures are <pattern>/<number>.jpg.
"""

from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from ds_cmli.common.lists import csv_rows
from ds_cmli.config.schema import STRICT
from ds_cmli.evaluate.model import PictureFile
from ds_cmli.evaluate.suites.choices import Choices, Question
from ds_cmli.evaluate.suites.task import Measure

COLUMNS = ("Question ID", "Type", "Statement")
PROMPT = "a photo of "  # before each statement, as published


@dataclass(config=STRICT, frozen=True)
class MMVP(Choices):
    chance: ClassVar[dict[str, float]] = {"mean": 1 / 4}
    file: Path  # Questions.csv
    images: Path  # `MLLM_VLM Images`, which has a folder for each pattern

    @cached_property
    def questions(self) -> list[Question]:
        out = []
        rows = list(csv_rows(self.file, COLUMNS))
        if len(rows) % 2:
            rows[-1].wrong("it has no second row of its pair")
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            pattern, files, captions = first.text("Type"), [], []
            for row in (first, second):
                # The published code chooses the picture by the number: odd is the pair's first.
                number = row.text("Question ID")
                odd = number.isdecimal() and int(number) % 2 == (row is first)
                if not odd or row.text("Type") != pattern:
                    row.wrong("a pair is an odd and an even 'Question ID' of one 'Type'")
                file = self.images / pattern / f"{number}.jpg"
                if not file.is_file():
                    row.wrong(f"its picture {str(file)!r} is not there")
                files.append(PictureFile(file))
                captions.append(PROMPT + row.text("Statement"))
            out.append(Question(tuple(files), tuple(captions), pattern))
        return out

    def measures(self, i2t: Tensor, t2i: Tensor) -> dict[str, Measure]:
        """The share of pairs whose both statements find their picture, by pattern, and `mean`.

        The first picture is chosen where it scores strictly higher, else the second, as published.
        """
        right = (t2i[:, 0, 0] > t2i[:, 1, 0]) & ~(t2i[:, 0, 1] > t2i[:, 1, 1])
        groups = self.groups
        return {"mean": Measure.mean_of_groups(right, groups), **Measure.by_group(right, groups)}
