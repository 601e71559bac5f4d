"""Retrieval with long captions, one of each picture: DOCCI, DCI, IIW, Urban-1k and ShareGPT4V.

DOCCI (Onoe et al., 2024) has `docci_descriptions.jsonlines` with `split`, `image_file` and
`description`; DCI (Urbanek et al., 2024) a JSON for each picture with `image`, `short_caption` and
`extra_caption`; IIW (Garg et al., 2024) JSON lines with `image/key` or `image`, and `IIW`; Urban-1k
(Zhang et al., 2024) a text file for each picture; ShareGPT4V (Chen et al., 2023) a JSON list with
`image` and `conversations`.
"""

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ds_cmli.common.errors import UserError
from ds_cmli.common.lists import (
    Entry,
    files_in,
    json_entries,
    json_lines,
    json_object,
    text_of,
)
from ds_cmli.config.schema import STRICT, PositiveCount
from ds_cmli.data.batch import Collate, Sample
from ds_cmli.data.numbered import black
from ds_cmli.evaluate.model import EvaluatedModel, PictureFile
from ds_cmli.evaluate.suites.pairs import recall
from ds_cmli.evaluate.suites.task import Measured

Files = Annotated[list[Path], Field(min_length=1)]


class LongCaptions:
    """A task of pairs of a picture and its caption: `suites.task.Task`."""

    @abstractmethod
    def read_pairs(self) -> Iterator[tuple[Path, str]]:
        """Each picture's file and caption. Raises `UserError`."""

    @cached_property
    def pairs(self) -> list[tuple[Path, str]]:
        return list(self.read_pairs())

    def read(self) -> None:
        assert self.pairs

    def run(self, model: EvaluatedModel) -> Measured:
        """Recall both ways, and `truncated`, the captions of which the model reads a part."""
        listed = _ListedPairs(self.pairs, model)
        measured = recall(model, listed, Collate(model.tokenizer))  # type: ignore[arg-type]
        if "left_out" in measured.figures:
            raise UserError(f"{measured.notes[0]}: fetch them again")
        return measured


class _ListedPairs:
    """The pairs as a data set that a model reads: `held_out.HeldOutPairs`."""

    def __init__(self, pairs: list[tuple[Path, str]], model: EvaluatedModel):
        self.pairs, self.model, self.size = pairs, model, model.config.data.image_size

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, row: int) -> str:
        return str(self.pairs[row][0])

    def image_id(self, row: int) -> int:
        return row

    def pair(self, row: int, picture: bool = True) -> Sample:
        file, caption = self.pairs[row]
        tokens = self.model.tokenizer(caption)
        if not picture:
            return Sample(black(self.size), tokens, row, row)
        shown = self.model.read(PictureFile(file))
        return Sample(shown.image, tokens, row, row, bad=shown.bad, grid=shown.grid)


@dataclass(config=STRICT, frozen=True)
class DOCCI(LongCaptions):
    file: Path  # docci_descriptions.jsonlines
    images: Path
    split: Literal["train", "test", "qual_dev", "qual_test"] = "test"

    def read_pairs(self) -> Iterator[tuple[Path, str]]:
        count = 0
        for entry in json_lines(self.file):
            if entry.text("split") == self.split:
                count += 1
                yield entry.picture("image_file", self.images), entry.text("description")
        if not count:
            raise UserError(f"{self.file} has no entry of the split {self.split!r}: give another")


@dataclass(config=STRICT, frozen=True)
class DCI(LongCaptions):
    files: Path  # annotations/, with a JSON for each picture
    images: Path  # photos/

    def read_pairs(self) -> Iterator[tuple[Path, str]]:
        for file in files_in(self.files, ".json"):
            entry = json_object(file)
            caption = f"{entry.text('short_caption')}\n{entry.get('extra_caption', str)}"
            yield entry.picture("image", self.images), caption.strip()


@dataclass(config=STRICT, frozen=True)
class IIW(LongCaptions):
    files: Files  # data.jsonl of IIW-400, DCI_Test and DOCCI_Test
    images: Files  # the folder of the pictures of each file

    def read_pairs(self) -> Iterator[tuple[Path, str]]:
        if len(self.files) != len(self.images):
            raise UserError(
                f"{len(self.files)} files and {len(self.images)} images: give each file the folder "
                "of its pictures"
            )
        for file, images in zip(self.files, self.images, strict=True):
            for entry in json_lines(file):
                key = "image" if "image" in entry.keys else "image/key"
                suffix = "" if entry.text(key).endswith(".jpg") else ".jpg"
                yield entry.picture(key, images, suffix), entry.text("IIW")


@dataclass(config=STRICT, frozen=True)
class Urban1k(LongCaptions):
    files: Path  # caption/, with a text file for each picture
    images: Path  # image/

    def read_pairs(self) -> Iterator[tuple[Path, str]]:
        for file in files_in(self.files, ".txt"):
            # The first line alone is read by the authors.
            entry = Entry(file, "line 1", {"caption": text_of(file).partition("\n")[0]})
            picture = self.images / f"{file.stem}.jpg"
            if not picture.is_file():
                entry.wrong(f"its picture {str(picture)!r} is not there")
            yield picture, entry.text("caption").strip()


@dataclass(config=STRICT, frozen=True)
class ShareGPT4V(LongCaptions):
    file: Path  # share-captioner_coco_lcs_sam_1246k_1107.json
    images: Path
    first: PositiveCount = 1000  # so many entries, which are held out of the authors' training

    def read_pairs(self) -> Iterator[tuple[Path, str]]:
        for _, entry in zip(range(self.first), json_entries(self.file), strict=False):
            turns = entry.get("conversations", list)
            if len(turns) < 2:
                entry.wrong("its 'conversations' have no answer")
            answer = Entry(self.file, f"{entry.place}, conversations", turns[1]).text("value")
            yield entry.picture("image", self.images), answer.replace("\n", " ")
