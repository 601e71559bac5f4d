"""CSV and TSV files of image paths and captions, as for open_clip's `--train-data`.

They are read so that no quote takes in the rows behind it unnoticed.
"""

import csv
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources.base import Parts, first_twice, unused
from ds_cmli.data.sources.listed import LOOKED_AT, Listed, image_folder

# In the message of the csv module for a field of more than `csv.field_size_limit()` characters.
LIMIT = "field limit"
# Usual names of the columns of the image and of the caption.
IMAGE_KEYS = (
    "filepath",
    "file_name",
    "filename",
    "image",
    "image_path",
    "img",
    "path",
    "jpg",
    "png",
    "image_bytes",
    "bytes",
)
CAPTION_KEYS = ("title", "caption", "captions", "text", "sentences")


def load_csv(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open the rows of all files; several rows with one path are captions of one image.

    Paths are absolute, or relative to `data.image_root`, the file's folder or its parent folder.

    Raises:
        UserError: a column is missing or ambiguous, the images are not found, or as `Table.rows`.
    """
    source: Listed | None = None
    notices: list[str] = []
    for file in files:
        try:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                table = Table(lines, file, config.separator.replace("\\t", "\t"))
                keys = find_columns(str(file), table.columns, table.columns, config)
                if keys[0] == keys[1]:
                    raise UserError(
                        f"{file} has image and caption in one column, {keys[0]!r}, where "
                        f"{table.separator!r} separates columns: give another separator by "
                        "data.separator (--csv-separator), or two columns"
                    )
                image, caption = (table.columns.index(key) for key in keys)
                rows = table.rows(image)
                first = list(islice(rows, LOOKED_AT))
                if source is None and first:
                    paths = [cells[image] for _, cells in first]
                    folder = image_folder(file, paths, config)
                    # The list is the user's own: a list of absolute paths may name files anywhere.
                    root = Path("/") if Path(paths[0]).is_absolute() else folder
                    source = Listed(name, folder, root, config)
                for line, cells in chain(first, rows):
                    if not cells[image] or "\0" in cells[image]:
                        raise UserError(
                            f"{file} line {line} has the image {cells[image]!r}: give its path"
                        )
                    assert source is not None
                    source.add(cells[image], cells[caption])
                if source is not None:
                    source.unused += unused("the columns", table.columns, keys)
                notices += table.notices()
        except UnicodeError as error:
            raise UserError(f"{file} cannot be read ({error}): save it as UTF-8 text") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror or error})") from None
    if source is None or not len(source):
        raise UserError(
            f"data.source is {name!r}, which has no row with a caption: give at least 2"
        )
    return Parts(source, notices=notices)


class Table:
    """The columns of a file, which its first line names, and its rows.

    Attributes:
        spanning: the first and the last line of each row that has more than one line.
    """

    def __init__(self, lines: TextIO, file: Path, separator: str = ""):
        """`lines` is the file, opened with `newline=""`. Raises `UserError` as `rows` does.

        Without a separator it is a tab if the first line has one, else a comma.
        """
        if not separator:
            separator = "\t" if "\t" in lines.readline() else ","
            lines.seek(0)
        if len(separator) != 1 or separator in '"\r\n':
            raise UserError(
                f"data.separator is {separator!r}: give one character, no quote and no line break"
            )
        self.file, self.separator = file, separator
        self.reader = csv.reader(lines, delimiter=separator, strict=True)
        self.spanning: list[tuple[int, int]] = []
        self.columns = self._next() or []
        if self.reader.line_num > 1:
            raise self._unclosed(1)
        twice = first_twice(self.columns)
        if twice is not None:
            raise UserError(f"{file} has the column {twice!r} twice: keep one")

    def rows(self, image: int) -> Iterator[tuple[int, list[str]]]:
        """Yield each row's first line, from 1, and its cells; blank lines are skipped.

        Cell `image` holds a file name.

        Raises:
            UserError: a row has more or fewer cells than the first line, or a quote is missing or
                out of place.
        """
        while True:
            start = self.reader.line_num + 1
            cells = self._next()
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(self.columns):
                raise UserError(
                    f"{self.file} line {start} has {len(cells)} cells and the first line "
                    f"{len(self.columns)}: quote texts with {self.separator!r}"
                )
            if self.reader.line_num > start:
                if self._takes_in_rows(cells, image):
                    raise self._unclosed(start)
                self.spanning.append((start, self.reader.line_num))
            yield start, cells

    def notices(self) -> list[str]:
        """A line about the rows that have several lines, if there are any."""
        if not self.spanning:
            return []
        first, last = self.spanning[0]
        return [
            f"{self.file} has {len(self.spanning)} quoted texts of several lines, the first in the "
            f"lines {first} to {last}: where that is not meant, a quote is missing"
        ]

    def _next(self) -> list[str] | None:
        """The next row's cells; None at the end."""
        start = self.reader.line_num + 1
        try:
            return next(self.reader, None)
        except csv.Error as error:
            if LIMIT in str(error):
                raise UserError(
                    f"{self.file} line {start} has a text of more than "
                    f"{csv.field_size_limit():,} characters: close its quote, or shorten it"
                ) from None
            if self.reader.line_num > start or "unexpected end" in str(error):
                raise self._unclosed(start) from None
            raise UserError(
                f"{self.file} line {start} cannot be read ({error}): put a text with quotes in "
                'quotes, and "" for each'
            ) from None

    def _unclosed(self, start: int) -> UserError:
        return UserError(
            f"{self.file} line {start} has a quote that is closed only after line "
            f'{self.reader.line_num}, or never: close it, or put the text in quotes and "" for '
            "each quote in it"
        )

    def _takes_in_rows(self, cells: list[str], image: int) -> bool:
        """Whether the row holds a file name of several lines, or a line that names an image."""
        end = Path(cells[image]).suffix.lower()
        for column, cell in enumerate(cells):
            for line in cell.splitlines()[1:]:
                if column == image:
                    return True
                parts = line.split(self.separator)
                if end and any(part.lower().endswith(end) for part in parts):
                    return True
        return False


def find_columns(
    where: str, images: list[str], captions: list[str], config: DataConfig
) -> tuple[str, str]:
    """The columns of the image and of the caption.

    These are those that are configured, or else the only ones with a usual name. A column without a
    usual name is taken if it is the only candidate.

    Args:
        images, captions: the columns that can hold images, and those that can hold captions.

    Raises:
        UserError: a column is not there, or there are none or several candidates.
    """
    image_setting = "data.image_key (--csv-img-key)"
    caption_setting = "data.caption_key (--csv-caption-key)"
    return (
        _column(where, images, config.image_key, IMAGE_KEYS, image_setting),
        _column(where, captions, config.caption_key, CAPTION_KEYS, caption_setting),
    )


def _column(
    where: str, columns: list[str], given: str, usual: tuple[str, ...], setting: str
) -> str:
    if given:
        if given not in columns:
            raise UserError(
                f"{setting} is {given!r}, and {where} has no such column: {nearest(given, columns)}"
            )
        return given
    possible = [column for column in columns if column.lower() in usual]
    if not possible and len(columns) == 1:
        possible = columns
    if len(possible) != 1:
        names = " and ".join(possible) or f"the columns {', '.join(columns) or 'none'}"
        raise UserError(f"{where} has {names}: say which one is meant by {setting}")
    return possible[0]
