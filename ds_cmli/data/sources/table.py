"""The rows of a CSV or TSV file, read so that no quote takes in the rows behind it unnoticed."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ds_cmli.common.errors import UserError

LIMIT = "field limit"  # in the message of the csv module for a field of more than `csv.field_size_limit()` characters


class Table:
    """The columns of a file, which its first line names, and its rows.

    Attributes:
        spanning: the first and the last line of each row that has more than one line.
    """

    def __init__(self, lines: TextIO, file: Path, separator: str):
        """`lines` is the file, opened with `newline=""`. Raises `UserError` as `rows` does."""
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
        twice = next((name for name in self.columns if self.columns.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{file} has the column {twice!r} twice: keep one")

    def rows(self, image: int) -> Iterator[tuple[int, list[str]]]:
        """Yield each row's first line, from 1, and its cells; blank lines are skipped. Cell `image` holds a file name.

        Raises:
            UserError: a row has more or fewer cells than the first line, or a quote is missing or out of place.
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
                    f"{self.file} line {start} has {len(cells)} cells and the first line {len(self.columns)}: "
                    f"quote texts with {self.separator!r}"
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
            f"{self.file} has {len(self.spanning)} quoted texts of several lines, the first in the lines {first} to "
            f"{last}: where that is not meant, a quote is missing"
        ]

    def _next(self) -> list[str] | None:
        """The next row's cells; None at the end."""
        start = self.reader.line_num + 1
        try:
            return next(self.reader, None)
        except csv.Error as error:
            if LIMIT in str(error):
                raise UserError(
                    f"{self.file} line {start} has a text of more than {csv.field_size_limit():,} characters: "
                    "close its quote, or shorten it"
                ) from None
            if self.reader.line_num > start or "unexpected end" in str(error):
                raise self._unclosed(start) from None
            raise UserError(
                f'{self.file} line {start} cannot be read ({error}): put a text with quotes in quotes, and "" for each'
            ) from None

    def _unclosed(self, start: int) -> UserError:
        return UserError(
            f"{self.file} line {start} has a quote that is closed only after line {self.reader.line_num}, or never: "
            'close it, or put the text in quotes and "" for each quote in it'
        )

    def _takes_in_rows(self, cells: list[str], image: int) -> bool:
        """Whether the row holds a file name of several lines, or a text with a line that itself names an image."""
        end = Path(cells[image]).suffix.lower()
        for column, cell in enumerate(cells):
            below = cell.splitlines()[1:]
            if column == image and below:
                return True
            parts = [part for line in below for part in line.split(self.separator)]
            if end and any(part.lower().endswith(end) for part in parts):
                return True
        return False
