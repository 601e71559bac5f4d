"""Reads lists of benchmarks and data: what is wrong is one line with the file and the place."""

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from ds_cmli.common.errors import UserError, printable
from ds_cmli.common.json_text import parse, read

Kind = TypeVar("Kind")
NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


class Entry(NamedTuple):
    """A value of a list, with its place for messages."""

    file: Path
    place: str  # such as "entry 3" or "line 3"
    value: object

    @property
    def keys(self) -> Collection[str]:
        return self.value.keys() if isinstance(self.value, dict) else ()

    def wrong(self, problem: str) -> NoReturn:
        raise UserError(f"{self.file}, {self.place}: {problem}: fetch it again, or repair it")

    def get(self, key: str | int, kind: type[Kind]) -> Kind:
        """The value of a key, of the type `kind`. Raises `UserError`."""
        if not isinstance(self.value, dict):
            self.wrong(f"{type(self.value).__name__} where an object is needed")
        if key not in self.value:
            self.wrong(f"no {key!r}")
        value = self.value[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            self.wrong(f"its {key!r} is {type(value).__name__}, and {NAMES[kind]} is needed")
        return value

    def text(self, key: str | int) -> str:
        """A text that is not empty. Raises `UserError`."""
        text = self.get(key, str)
        if not text.strip() or printable(text) != text:
            self.wrong(f"its {key!r} is {text!r}, and a text of whole characters is needed")
        return text

    def texts(self, key: str) -> list[str]:
        """A list of texts that are not empty. Raises `UserError`."""
        texts = enumerate(self.get(key, list))
        return [Entry(self.file, f"{self.place}, {key}", {n: t}).text(n) for n, t in texts]

    def entries(self, key: str) -> "Iterator[Entry]":
        """The values of a list, of which there is one at least. Raises `UserError`."""
        values = self.get(key, list)
        if not values:
            self.wrong(f"its {key!r} is empty")
        return (Entry(self.file, f"{key}[{number}]", value) for number, value in enumerate(values))

    def picture(self, key: str, folder: Path, suffix: str = "") -> Path:
        """The file in `folder` that a key names. Raises `UserError` if it is not there."""
        name = self.text(key) + suffix
        if "\0" in name or not (folder / name).is_file():
            self.wrong(f"its picture {name!r} is not in {folder}")
        return folder / name


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder, sorted by name. Raises `UserError` if there is none."""
    files = sorted(folder.glob(f"*{suffix}"))
    if not files:
        raise UserError(f"{folder} has no {suffix} file: name the folder that has them")
    return files


def json_entries(file: Path) -> Iterator[Entry]:
    """The entries of a JSON file, which has a list, or an object of entries by number.

    Raises:
        UserError: it is no JSON or has no entry.
    """
    content = _json(file, object)
    if not isinstance(content, list | dict) or not content:
        _refuse(file, "which has no list of entries")
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    return (Entry(file, f"entry {key}", value) for key, value in entries)


def json_object(file: Path) -> Entry:
    """The object of a JSON file. Raises `UserError`."""
    return Entry(file, "its object", _json(file, dict))


def json_lines(file: Path) -> Iterator[Entry]:
    """The objects of a file with one on each line; blank lines are skipped. Raises `UserError`."""
    for number, line in text_lines(file).items():
        try:
            yield Entry(file, f"line {number}", parse(line, dict))
        except ValueError as error:
            Entry(file, f"line {number}", None).wrong(f"no JSON object ({error})")


def csv_rows(file: Path, columns: Sequence[str]) -> Iterator[Entry]:
    """The rows of a CSV file by the names of its first line, which are `columns` in their order.

    Raises:
        UserError: it has other columns, a row of another length, an open quote, or no row.
    """
    rows = csv.reader(io.StringIO(text_of(file), newline=""))
    if next(rows, []) != list(columns):
        _refuse(file, f"whose first line is not {','.join(columns)}")
    count, line = 0, rows.line_num + 1
    try:
        for row in rows:
            entry = Entry(file, f"line {line}", dict(zip(columns, row, strict=False)))
            line = rows.line_num + 1
            if "\n" in "".join(row):
                entry.wrong("a quote is not closed")
            if row and len(row) != len(columns):
                entry.wrong(f"{len(row)} cells where {len(columns)} are needed")
            if row:
                count += 1
                yield entry
    except csv.Error as error:
        Entry(file, f"line {line}", None).wrong(f"no CSV ({error})")
    if not count:
        _refuse(file, "which has no row")


def _json(file: Path, kind: type[Kind]) -> Kind:
    try:
        return read(file, kind)
    except (OSError, ValueError) as error:
        _refuse(file, f"which cannot be read as JSON ({error})")


def text_of(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises `UserError`."""
    try:
        if not file.is_file():  # a pipe could block for ever
            raise ValueError("no regular file")
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        _refuse(file, f"which cannot be read ({error})")


def text_lines(file: Path) -> dict[int, str]:
    """The lines that are not blank, by their numbers. Raises `UserError` if there is none."""
    lines = enumerate(text_of(file).split("\n"), 1)
    rows = {number: line.strip() for number, line in lines if line.strip()}
    if not rows:
        _refuse(file, "which is empty")
    return rows


def _refuse(file: Path, problem: str) -> NoReturn:
    raise UserError(f"{file}, {problem}: fetch it again, or name another")
