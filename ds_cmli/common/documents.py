"""Tables for the terminal and as Markdown, numbers in them, and self-contained HTML pages."""

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ds_cmli.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Table:
    title: str
    columns: list[str]  # a column whose last word is "B", "GB" or "share" is right-aligned
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        table = markdown_table(self.columns, self.rows)
        return "\n".join(
            [f"## {self.title}", "", table, "", *(f"- {note}" for note in self.notes), ""]
        )

    def show(self, console: "Console") -> None:
        """Print it on a rich console."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(
            title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
        )
        for name in self.columns:
            table.add_column(name, justify="right" if _numeric(name) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(f"  {escape(note)}", highlight=False)
        console.print()


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    alignment = ["---" + ":" * _numeric(name) for name in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows))


def _numeric(column: str) -> bool:
    return column.rsplit(" ", 1)[-1] in ("B", "GB", "share")


def count(number: int | None) -> str:
    """The number with thousands separators, as in 1,024; "-" for None."""
    return "-" if number is None else f"{number:,}"


def readable(size: int) -> str:
    for unit, one in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size} B"


def write_page(
    path: str | Path, setting: str, package: str, template: str, **values: object
) -> None:
    """Fill `template`, a file of `package`, with `values` and write it to `path`.

    Templates extend `page.html.jinja`, which has the head, and the colours on light and dark paper.

    Args:
        setting: what gave the path, for the error message.

    Raises:
        UserError: the file cannot be written.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape

    folders = ChoiceLoader([PackageLoader(package, "."), PackageLoader("ds_cmli.common", ".")])
    environment = Environment(loader=folders, autoescape=select_autoescape(["jinja"]))
    text = environment.get_template(template).render(values)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{setting} is {str(path)!r}: cannot write it: {error.strerror}") from None


def data_url(image: bytes, kind: str) -> str:
    """An encoded image, "png" or "jpeg", as a `data:` URL, with which the page itself holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
