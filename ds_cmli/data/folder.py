"""Pairs from a folder: images beside a `metadata.jsonl` or `metadata.csv` with `file_name` and `text`.

This is the imagefolder convention of Hugging Face datasets. S image size in pixels.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.data.bad import Bad
from ds_cmli.data.batch import Sample
from ds_cmli.data.tokens import CaptionTokenizer, Tokens

METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "text")
VALIDATION = ("validation", "val")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000
MOST_TRIES = 100  # samples in a row that cannot be read before giving up


@dataclass
class Rows:
    """The usable rows of one metadata file, and those left out for an empty caption."""

    folder: Path  # file names are relative to it
    files: list[str]
    texts: list[str]
    bad: list[Bad]

    def select(self, keep: list[bool]) -> "Rows":
        kept = [i for i, k in enumerate(keep) if k]
        return Rows(self.folder, [self.files[i] for i in kept], [self.texts[i] for i in kept], self.bad)


class FolderPairs(Dataset):
    """Map-style dataset over `Rows`: image uint8 [3, S, S], shorter side resized to S (bicubic), centre cropped.

    A sample whose image cannot be read or whose caption has no valid token is replaced by the next one that can be
    used, always the same one, and says so in `Sample.bad`.

    Raises:
        UserError: `MOST_TRIES` samples in a row cannot be used.
    """

    def __init__(self, rows: Rows, tokenizer: CaptionTokenizer, size: int):
        self.rows, self.tokenizer, self.size = rows, tokenizer, size

    def __len__(self) -> int:
        return len(self.rows.files)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first_bad: Bad | None = None
        tries = min(MOST_TRIES, len(self))
        for step in range(tries):
            found = self._read((index + step) % len(self))
            if not isinstance(found, str):
                return Sample(*found, index=index, bad=first_bad)
            first_bad = first_bad or (self.rows.files[index], found)
        assert first_bad is not None
        raise UserError(
            f"{tries} samples in a row of {self.rows.folder} cannot be used, from {first_bad[0]} ({first_bad[1]}) on: "
            "mend or remove them"
        )

    def _read(self, index: int) -> tuple[torch.Tensor, Tokens] | str:
        """Image and tokens, or why there are none."""
        tokens = self.tokenizer(self.rows.texts[index])
        if not any(tokens.valid):
            return "caption without a token"
        path = self.rows.folder / self.rows.files[index]
        try:
            with Image.open(path) as image:
                return load_image(image, self.size), tokens
        except FileNotFoundError:
            return "no such file"
        except Exception as error:  # decoders of damaged files raise nearly anything
            return f"{type(error).__name__}: {error}".replace("\n", " ").replace(str(path), "").strip(": ")


def load_image(image: Image.Image, size: int) -> torch.Tensor:
    """Upright, RGB on white, shorter side resized to `size` (bicubic), centre cropped: uint8 [3, size, size]."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def load_folder(source: str) -> tuple[Rows, Rows]:
    """Training and validation rows of a folder.

    `train/` and `validation/` (or `val/`), each with its own metadata; a folder without a validation part has
    `HELD_OUT_SHARE` of its files held out (at least 1, at most `HELD_OUT_MOST`), chosen by a hash of the file name.

    Raises:
        UserError: no such folder, no metadata, a line that cannot be read, a missing column, a file name that leads
            out of the folder, or fewer than two images.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UserError(f"data.source is {source!r}, which is no folder: give 'demo' or a folder with {METADATA[0]}")
    train = root / "train" if _metadata(root / "train") else root
    metadata = _metadata(train)
    if metadata is None:
        raise UserError(
            f"data.source is {source!r}, which has no {' or '.join(METADATA)} (nor has its train folder): "
            'write one with a line like {"file_name": "1.jpg", "text": "a red bicycle"} for each image'
        )
    rows = read_metadata(metadata)
    for name in VALIDATION:
        if train != root and (validation := _metadata(root / name)):
            return _not_empty(rows, metadata), _not_empty(read_metadata(validation), validation)
    held_out = _held_out(rows, metadata)
    train_rows = rows.select([file not in held_out for file in rows.files])
    validation_rows = rows.select([file in held_out for file in rows.files])
    validation_rows.bad = []  # told once, with the training rows
    return train_rows, validation_rows


def _held_out(rows: Rows, metadata: Path) -> set[str]:
    files = sorted(set(rows.files), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(files) < 2:
        raise UserError(
            f"{metadata} names {len(files)} images with a caption ({len(rows.bad)} without): "
            "give at least 2, as one is held out for validation"
        )
    return set(files[: min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(files))))])


def _not_empty(rows: Rows, metadata: Path) -> Rows:
    if not rows.files:
        raise UserError(f"{metadata} has no usable line: give each image a file_name and a text")
    return rows


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def read_metadata(path: Path) -> Rows:
    """The rows of one metadata file; raises `UserError` as `load_folder`."""
    rows = Rows(path.parent, [], [], [])
    try:
        for line, values in _lines(path):
            for column in COLUMNS:
                if column not in values:
                    found = ", ".join(map(str, values)) or "none"
                    hint = nearest(column, values) if values else "add it"
                    raise UserError(f"{path} line {line} has no column {column!r} (found: {found}): {hint}")
            file, text = values["file_name"], values["text"]
            if not isinstance(file, str) or not file:
                raise UserError(f"{path} line {line} has file_name {file!r}: give the image's path as text")
            if os.path.isabs(file) or os.path.normpath(file).split(os.sep)[0] == os.pardir:
                raise UserError(f"{path} line {line} has file_name {file!r}: give a path inside {path.parent}")
            if not isinstance(text, str | None):
                raise UserError(f"{path} line {line} has text {text!r}: give the caption as text")
            if not text or not text.strip():
                rows.bad.append((file, "empty caption"))
            else:
                rows.files.append(file)
                rows.texts.append(text)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): save it as UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    return rows


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, its values by column) of each row; blank lines are passed over."""
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for values in reader:
                values.pop(None, None)  # type: ignore[call-overload]  # surplus cells
                yield reader.line_num, values
        return
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is no JSON ({error.msg}): write one object a line") from None
            if not isinstance(values, dict):
                raise UserError(f"{path} line {number} is {type(values).__name__}: write one JSON object a line")
            yield number, values
