"""Tables for the terminal and as Markdown, and numbers in them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ds_cmli.common.documents import is_numeric, markdown_table

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Table:
    title: str
    columns: list[str]
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
            table.add_column(name, justify="right" if is_numeric(name) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(f"  {escape(note)}", highlight=False)
        console.print()


def count(number: int | None) -> str:
    """The number with thousands separators, as in 1,024; "-" for None."""
    return "-" if number is None else f"{number:,}"


def readable(size: int) -> str:
    for unit, one in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size} B"
