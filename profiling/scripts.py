"""What the scripts share: timing and tables."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ds_cmli.common.documents import is_numeric, markdown_table

if TYPE_CHECKING:
    import torch
    from rich.console import Console

Name = TypeVar("Name", bound=Hashable)
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

clock_option = click.option("--clock", type=click.Choice(tuple(CLOCKS)), default="wall", show_default=True,
                            help="cpu: this process's time alone, for a CPU that others use too.")  # fmt: skip


def compare(
    functions: Mapping[Name, Callable[[], object]], repeats: int, clock: Clock, warm_ups: int = 1
) -> dict[Name, list[float]]:
    """Seconds of each function, `repeats` times, all of them in turn; the order turns round each time.

    They run `warm_ups` times before.
    """
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for repeat in range(-warm_ups, repeats):
        for name in list(functions)[:: 1 if repeat % 2 else -1]:
            started = clock()
            functions[name]()
            if repeat >= 0:
                times[name].append(clock() - started)
    return times


def to_the_end(call: Callable[..., object], device: "torch.device") -> Callable[..., None]:
    """The call, until the device has finished it."""

    def run(*arguments: Any) -> None:
        call(*arguments)
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize()  # CPU-GPU sync

    return run


@dataclass
class Table:
    """A table for the terminal and as Markdown."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        table = markdown_table(self.columns, self.rows)
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"## {self.title}", "", table, "", *notes, ""])

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
