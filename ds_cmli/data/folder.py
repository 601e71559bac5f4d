"""Which pairs a folder holds: images beside a `metadata.jsonl` or `metadata.csv` with `file_name` and `text`.

This is the imagefolder convention of Hugging Face datasets.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.data.bad import Bad
from ds_cmli.data.pictures import inside

METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "text")
VALIDATION = ("validation", "val")
OTHER_SPLITS = ("test", "testing", "training", "valid", "dev", "eval", "evaluation")  # that other tools read
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000
ACCEPTED = (
    "accepted are 'demo' and a folder of images with a metadata.jsonl, which has a line like "
    '{"file_name": "1.jpg", "text": "a red bicycle"} for each, or a metadata.csv with these columns; or one with such '
    "folders train/ and validation/ in it"
)
# What else data comes in, by the end of a file's name.
KINDS = {
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"), "a tar archive"),
    ".zip": "a zip archive", ".parquet": "a parquet file", ".arrow": "an Arrow file, as save_to_disk writes it",
    ".jsonl": "a JSON lines file", ".json": "a JSON file", ".csv": "a CSV file", ".tsv": "a TSV file",
}  # fmt: skip


@dataclass
class Rows:
    """The usable rows of one metadata file, and those left out for an empty caption."""

    folder: Path  # file names are relative to it
    files: list[str]
    texts: list[str]
    bad: list[Bad]
    root: Path  # the data folder, which `folder` is or lies in
    notices: list[str] = field(default_factory=list)  # what of the data folder is not used

    def select(self, keep: list[bool]) -> "Rows":
        kept = [i for i, k in enumerate(keep) if k]
        files, texts = [self.files[i] for i in kept], [self.texts[i] for i in kept]
        return Rows(self.folder, files, texts, self.bad, self.root, self.notices)


def load_folder(source: str, follow_symlinks: bool = False) -> tuple[Rows, Rows]:
    """Training and validation rows of a folder.

    `train/` and `validation/` (or `val/`), each with its own metadata; a folder without a validation part has
    `HELD_OUT_SHARE` of its files held out (at least 1, at most `HELD_OUT_MOST`), chosen by a hash of the file name.

    Raises:
        UserError: no such folder, no metadata or more than one that could be meant, a line that cannot be read, a
            missing column, a file name that leads out of the folder, or fewer than two images.
    """
    try:
        root = Path(source).expanduser()
        if not root.is_dir():
            kind = _kind(root.name) or "a file" if root.exists() else "it does not exist"
            raise UserError(f"data.source is {source!r}, which is no folder ({kind}): {ACCEPTED}")
        return _load(root, follow_symlinks)
    except (OSError, RuntimeError) as error:  # no right to look, too long a name, a home that is not there
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.source is {source!r}, which cannot be read ({reason}): {ACCEPTED}") from None


def _load(root: Path, follow_symlinks: bool) -> tuple[Rows, Rows]:
    found = {name: _metadata(root / name) for name in (".", "train", *VALIDATION)}
    metadata = {name: path for name, path in found.items() if path is not None}
    training = [name for name in (".", "train") if name in metadata]
    validation = [name for name in VALIDATION if name in metadata]
    if not training:
        none = f"a folder with no {' or '.join(METADATA)} in it or in its train/ ({_contents(root)})"
        raise UserError(f"data.source is {str(root)!r}, {none}: {ACCEPTED}")
    if len(metadata) > 1 and list(metadata) not in [["train", name] for name in VALIDATION]:
        names = " and ".join(str(path.relative_to(root)) for path in metadata.values())
        raise UserError(f"data.source is {str(root)!r}, which has {names}: keep one, or train/ and validation/ alone")
    for path in metadata.values():
        if not follow_symlinks and not inside(path, os.path.realpath(root)):
            raise UserError(f"{path} is a symlink out of the data folder: data.follow_symlinks=true allows it")
    rows = read_metadata(metadata[training[0]], root)
    rows.notices = _not_used(root, training[0], validation, rows)
    if validation:
        held_out = read_metadata(metadata[validation[0]], root)
        return _not_empty(rows, metadata[training[0]]), _not_empty(held_out, metadata[validation[0]])
    chosen = _held_out(rows, metadata[training[0]])
    train_rows = rows.select([file not in chosen for file in rows.files])
    validation_rows = rows.select([file in chosen for file in rows.files])
    validation_rows.bad = []  # told once, with the training rows
    return train_rows, validation_rows


def _not_used(root: Path, training: str, validation: list[str], rows: Rows) -> list[str]:
    """A line for each folder that looks like a part of the data and is none."""
    candidates = [name for name in (*VALIDATION, *OTHER_SPLITS) if name not in validation and (root / name).is_dir()]
    if training == ".":
        named = {file.split("/", 1)[0] for file in rows.files}
        candidates = [name for name in candidates if name not in named]
    training = f"{training}/" if training != "." else "the folder around it"
    held_out = f"{validation[0]}/" if validation else "a share of that, as no validation/ has metadata"
    return [f"{root / name} is not used: training takes {training}, validation {held_out}" for name in candidates]


def _metadata(folder: Path) -> Path | None:
    paths = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(paths) > 1:
        raise UserError(f"{folder} has both {' and '.join(METADATA)}: keep the one that is meant")
    if paths and not paths[0].is_file():
        raise UserError(f"{paths[0]} is no file that can be read: write one with a line for each image")
    return paths[0] if paths else None


def _kind(name: str) -> str | None:
    return next((kind for end, kind in KINDS.items() if name.lower().endswith(end)), None)


def _contents(folder: Path) -> str:
    """What a folder without metadata holds, in a few words."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, 1000))
    if {"dataset_dict.json", "state.json"} & set(names):
        return "it is one that save_to_disk wrote"
    told = next((f"it holds {name}, {kind}" for name in names if (kind := _kind(name))), None)
    return told or (f"it holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "it is empty")


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


def read_metadata(path: Path, root: Path | None = None) -> Rows:
    """The rows of one metadata file of the data folder `root`; raises `UserError` as `load_folder`."""
    rows = Rows(path.parent, [], [], [], root or path.parent)
    try:
        for line, values in _lines(path):
            for column in COLUMNS:
                if column not in values:
                    found = ", ".join(map(str, values)) or "none"
                    hint = nearest(column, values) if values else "add it"
                    raise UserError(f"{path} line {line} has no column {column!r} (found: {found}): {hint}")
            file, text = values["file_name"], values["text"]
            if not isinstance(file, str) or not file or "\0" in file:
                raise UserError(f"{path} line {line} has file_name {file!r}: give the image's path as text")
            if os.path.isabs(file) or os.path.normpath(file).split(os.sep)[0] == os.pardir:
                raise UserError(f"{path} line {line} has file_name {file!r}: give a path inside {path.parent}")
            if not isinstance(text, str | None):
                raise UserError(f"{path} line {line} has text {text!r}: give the caption as text")
            try:
                (file + (text or "")).encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write
                raise UserError(f"{path} line {line} is no Unicode ({error.reason}): give whole characters") from None
            file = os.path.normpath(file)  # images are told apart by it
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
                if None in values:
                    place = f"{path} line {reader.line_num}"
                    raise UserError(f"{place} has more cells than the first line: put texts with commas in quotes")
                yield reader.line_num, values
        return
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or str(error)
                raise UserError(f"{path} line {number} is no JSON ({reason}): write one object a line") from None
            if not isinstance(values, dict):
                raise UserError(f"{path} line {number} is {type(values).__name__}: write one JSON object a line")
            yield number, values
