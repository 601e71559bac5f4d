"""A CSV or TSV file with a column of image paths and a column of captions, as for open_clip's `--train-data`."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources.base import Parts
from ds_cmli.data.sources.columns import find_columns
from ds_cmli.data.sources.images_of import image_folder
from ds_cmli.data.sources.listed import Listed


def load_csv(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open the rows of all files; several rows with one path are captions of one image.

    Paths are absolute, or relative to `data.image_root`, the file's folder or its parent folder.

    Raises:
        UserError: a column is missing or ambiguous, a row has another length, or the images are not found.
    """
    source: Listed | None = None
    for file in files:
        try:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                for line, path, caption in _rows(lines, file, config):
                    if not path or "\0" in path:
                        raise UserError(f"{file} line {line} has the image {path!r}: give its path")
                    if source is None:
                        folder = image_folder(file, path, config)
                        # The list is the user's own, so a list of absolute paths may name files anywhere.
                        source = Listed(name, folder, Path("/") if Path(path).is_absolute() else folder, config)
                    source.add(path, caption)
        except (UnicodeError, csv.Error) as error:
            raise UserError(f"{file} cannot be read ({error}): save it as UTF-8 text") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror or error})") from None
    if source is None or not len(source):
        raise UserError(f"data.source is {name!r}, which has no row with a caption: give at least 2")
    return Parts(source)


def _rows(lines: TextIO, file: Path, config: DataConfig) -> Iterator[tuple[int, str, str]]:
    """Yield line number, path and caption of each row."""
    header = lines.readline()
    separator = config.separator.replace("\\t", "\t") or ("\t" if "\t" in header else ",")
    if len(separator) != 1:
        raise UserError(f"data.separator is {config.separator!r}: give one character")
    lines.seek(0)
    reader = csv.reader(lines, delimiter=separator)
    columns = next(reader, [])
    image, caption = (columns.index(c) for c in find_columns(str(file), columns, columns, config))
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(columns):
            place = f"{file} line {reader.line_num}"
            raise UserError(
                f"{place} has {len(cells)} cells and the first line {len(columns)}: quote texts with {separator!r}"
            )
        yield reader.line_num, cells[image], cells[caption]
