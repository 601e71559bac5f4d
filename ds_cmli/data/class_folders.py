"""Pictures with class labels for zero-shot classification: a folder of class folders, or another of timm's readers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.data.held_out import FILLER, Picture, View
from ds_cmli.data.pictures import decode

# Seven of OpenAI's eighty prompt templates for ImageNet, which OpenAI found to work about as well as all eighty.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


class ClassPictures:
    """The pictures of a folder of class folders, of a tar of class folders, or of a Hugging Face data set with labels.

    Attributes:
        folders: the class names in the data, in the order of the class numbers.
    """

    def __init__(self, source: str, size: int, max_pixels: int, split: str = "validation"):
        """Open `source`: a folder, a .tar, or "hfds/NAME" in timm's notation, of which `split` is read.

        Raises:
            UserError: `source` is none of these, cannot be read, or has no picture or fewer than two classes.
        """
        self.size, self.max_pixels = size, max_pixels
        where, path = f"--zero-shot is {source!r}", Path(source).expanduser()
        if not path.exists() and not source.startswith("hfds/"):
            raise UserError(
                f"{where}: give a folder that has a folder of pictures for each class, or hfds/NAME"
            )
        from timm.data.readers import create_reader

        try:
            name, root = ("", str(path)) if path.exists() else (source, None)
            self.reader: Any = create_reader(name, root=root, split=split)
        except Exception as error:  # each of timm's readers raises its own exceptions
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"{where}, which timm cannot read: {reason}") from None
        numbers = self.reader.class_to_idx
        self.folders = [str(name) for name, _ in sorted(numbers.items(), key=lambda item: item[1])]
        if len(self.folders) < 2 or not len(self.reader):
            raise UserError(
                f"{where}, with {len(self.folders)} classes and {len(self.reader)} pictures: give at least 2"
            )

    def __len__(self) -> int:
        return len(self.reader)

    def pictures(self, numbers: Sequence[int]) -> Dataset:
        """A data set of `Picture`s with their classes; broken pictures and `FILLER` are black."""
        return View(self._picture, numbers)

    def _picture(self, number: int) -> Picture:
        black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        if number == FILLER:
            return Picture(black, FILLER)
        try:
            file, target = self.reader[number]
            with file:
                return Picture(
                    decode(file.read(), self.size, self.max_pixels), number, target=int(target)
                )
        except Exception as error:  # decoders raise nearly any exception for damaged files
            reason = str(error).strip().splitlines() or [type(error).__name__]
            name = (
                self.reader.filename(number, basename=True) or f"picture {number}"
            )  # parquet rows may have no name
            return Picture(black, number, bad=(str(name), reason[0]))


def class_names(folders: list[str], file: str | None) -> list[str]:
    """The names of the classes for the prompts: the folder names with blanks for underscores, or those in `file`.

    Args:
        file: a JSON object {"folder": "name"}, or a text file with one name per line in the order of `folders`.

    Raises:
        UserError: the file cannot be read, or lacks a class.
    """
    if file is None:
        return [folder.replace("_", " ") for folder in folders]
    try:
        text = Path(file).read_text(encoding="utf-8")
        names = json.loads(text) if file.endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names is {file!r}, which cannot be read: {error}") from None
    if isinstance(names, dict):
        missing = [folder for folder in folders if not isinstance(names.get(folder), str)]
        if missing:
            raise UserError(f"--class-names is {file!r}: it has no name for {missing[0]!r}")
        return [names[folder] for folder in folders]
    names = [str(name) for name in names if str(name).strip()]
    if len(names) != len(folders):
        raise UserError(
            f"--class-names is {file!r}, with {len(names)} names: there are {len(folders)} classes"
        )
    return names


def prompt_templates(file: str | None) -> list[str]:
    """`TEMPLATES`, or the lines of a file, each with one {} for the class name; raises `UserError`."""
    if file is None:
        return list(TEMPLATES)
    try:
        lines = [
            line.strip()
            for line in Path(file).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"--templates is {file!r}, which cannot be read: {error}") from None
    wrong = next((line for line in lines if line.count("{}") != 1), None if lines else "")
    if wrong is not None:
        raise UserError(
            f"--templates is {file!r}, with the line {wrong!r}: write {{}} once where the class's name goes"
        )
    return lines
