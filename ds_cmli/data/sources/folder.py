"""A folder of images with a `metadata.jsonl` or `metadata.csv`.

These have the columns `file_name` and `text`: the imagefolder convention of Hugging Face datasets.
"""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.common.json_text import parse
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.pictures import inside
from ds_cmli.data.sources.base import Parts, unused
from ds_cmli.data.sources.find import accepted
from ds_cmli.data.sources.listed import Listed
from ds_cmli.data.sources.tables import Table

METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "text")
VALIDATION = ("validation", "val")
# The split names of other tools.
OTHER_SPLITS = ("test", "testing", "training", "valid", "dev", "eval", "evaluation")


def load_folder(source: str, files: list[Path], config: DataConfig) -> Parts:
    """Open the training and validation pairs of a folder; `files` is not used.

    The folder has either one metadata file, or `train/` and `validation/` (or `val/`) with a
    metadata file each.

    Raises:
        UserError: the folder does not exist, its metadata are missing or ambiguous, a line cannot
            be read, a column is missing, or a file name leads out of the folder.
    """
    try:
        root = Path(source).expanduser()
        if not root.is_dir():
            kind = "it does not exist"
            if root.exists():
                kind = "a file"
            raise UserError(f"data.source is {source!r}, which is no folder ({kind}): {accepted()}")
        return _load(root, config)
    # No permission, a name that is too long, an unknown home folder.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"data.source is {source!r}, which cannot be read ({reason}): {accepted()}"
        ) from None


def _load(root: Path, config: DataConfig) -> Parts:
    metadata = {}
    for name in (".", "train", *VALIDATION):
        path = _metadata(root / name)
        if path is not None:
            metadata[name] = path
    training = next((name for name in (".", "train") if name in metadata), None)
    validation = next((name for name in VALIDATION if name in metadata), None)
    if training is None:
        contents = f"a folder with no {' or '.join(METADATA)} in it or in its train/"
        raise UserError(
            f"data.source is {str(root)!r}, {contents} ({_contents(root)}): {accepted()}"
        )
    if len(metadata) > 1 and (len(metadata) > 2 or training == "."):
        names = " and ".join(str(path.relative_to(root)) for path in metadata.values())
        raise UserError(
            f"data.source is {str(root)!r}, which has {names}: keep one, or train/ and validation/ "
            "alone"
        )
    for path in metadata.values():
        if not config.follow_symlinks and not inside(path, os.path.realpath(root)):
            raise UserError(
                f"{path} is a symlink out of the data folder: data.follow_symlinks=true allows it"
            )
    notices: list[str] = []
    train = read_metadata(metadata[training], root, config, notices)
    parts = Parts(train)
    parts.notices = [*_not_used(root, training, validation, train, config), *notices]
    if validation is not None:
        parts.validation = read_metadata(metadata[validation], root, config, parts.notices)
        for part, name in ((train, training), (parts.validation, validation)):
            if not len(part):
                raise UserError(
                    f"{metadata[name]} has no usable line: give each image a file_name and a text"
                )
    return parts


def _not_used(
    root: Path, training: str, validation: str | None, train: Listed, config: DataConfig
) -> list[str]:
    """A notice for each subfolder that looks like a split of the data but is not used."""
    others = [name for name in (*VALIDATION, *OTHER_SPLITS) if name != validation]
    candidates = [name for name in others if (root / name).is_dir()]
    taken = f"{training}/"
    if training == ".":
        taken = "the folder around it"
        if candidates:
            named = {file.split("/", 1)[0] for file in train.files}
            candidates = [name for name in candidates if name not in named]
    held_out = f"{validation}/"
    if config.val_source:
        held_out = "data.val_source"
    elif validation is None:
        held_out = "a share of that, as no validation/ has metadata"
    return [
        f"{root / name} is not used: training takes {taken}, validation {held_out}"
        for name in candidates
    ]


def _metadata(folder: Path) -> Path | None:
    paths = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(paths) > 1:
        raise UserError(f"{folder} has both {' and '.join(METADATA)}: keep one of them")
    if paths and not paths[0].is_file():
        raise UserError(
            f"{paths[0]} is no file that can be read: write one with a line for each image"
        )
    return next(iter(paths), None)


def _contents(folder: Path) -> str:
    """Describe the content of a folder without metadata in a few words."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, 1000))
    if not names:
        return "it is empty"
    return f"it holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def read_metadata(path: Path, root: Path, config: DataConfig, notices: list[str]) -> Listed:
    """Read the pairs of one metadata file of the data folder `root`.

    Lines for the user are appended to `notices`. Raises `UserError` as `load_folder` does.
    """
    rows = Listed(str(path), path.parent, root, config)
    columns: dict[str, object] = {}
    try:
        for line, values in _csv(path, notices) if path.suffix == ".csv" else _json_lines(path):
            file = _file(path, line, values)
            columns.update(values)
            try:
                for text in _texts(values["text"], path, line):
                    rows.add(file, text)
            except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
                raise UserError(
                    f"{path} line {line} is no Unicode ({error.reason}): give whole characters"
                ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read ({error}): save it as UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    rows.unused = unused("the columns", columns, COLUMNS)
    return rows


def _file(path: Path, line: int, values: dict[str, object]) -> str:
    """The file that a row names. Raises `UserError` if it lacks a column or names none inside."""
    for column in COLUMNS:
        if column not in values:
            names = ", ".join(map(str, values)) or "none"
            hint = nearest(column, values) if values else "add it"
            raise UserError(f"{path} line {line} has no column {column!r} (found: {names}): {hint}")
    file = values["file_name"]
    said = f"{path} line {line} has file_name {file!r}"
    if not isinstance(file, str) or not file or "\0" in file:
        raise UserError(f"{said}: give the image's path as text")
    if os.path.isabs(file) or os.path.normpath(file).split(os.sep)[0] == os.pardir:
        raise UserError(f"{said}: give a path inside {path.parent}")
    return file


def _texts(value: object, path: Path, line: int) -> list[str | None]:
    """The captions of a row: a text, nothing, or a list of texts.

    Empty texts do not count where there are others.
    """
    texts: list = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in texts):
        shown = repr(value) if len(repr(value)) < 100 else type(value).__name__
        raise UserError(
            f"{path} line {line} has text {shown}: give the caption as text, or a list of texts"
        )
    return [text for text in texts if text and text.strip()] or [None]


def _csv(path: Path, notices: list[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield (line number from 1, values by column) of each row."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = Table(file, path, ",")
        image = table.columns.index("file_name") if "file_name" in table.columns else 0
        for line, cells in table.rows(image):
            yield line, dict(zip(table.columns, cells, strict=True))
        notices += table.notices()


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield (line number from 1, values by column) of each line; blank lines are skipped."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, parse(line, dict)
            except ValueError as error:
                raise UserError(
                    f"{path} line {number} is no JSON ({error}): write one object a line"
                ) from None
