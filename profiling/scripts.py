"""What the scripts share: options, timing, processes, tables and pictures."""

import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ds_cmli.common import plots
from ds_cmli.common.cli import json_on_stdout
from ds_cmli.common.documents import is_numeric, markdown_table

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
Name = TypeVar("Name", bound=Hashable)
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

clock_option = click.option("--clock", type=click.Choice(tuple(CLOCKS)), default="wall", show_default=True,
                            help="cpu: this process's time alone, for a CPU that others use too.")  # fmt: skip


def prints_json(measured: Callable[..., object]) -> Callable[..., None]:
    """A command with the option --json, which leaves stdout to the returned figures alone."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object alone.")
    @functools.wraps(measured)
    def run(as_json: bool, **options: Any) -> None:
        with json_on_stdout(as_json) as print_json:
            figures = measured(**options)
            if as_json:
                print_json(figures)

    return run


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


def processor() -> str:
    """The processor's name; "" if it is not known."""
    from cpuinfo import get_cpu_info

    return get_cpu_info().get("brand_raw", "")


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    out: str
    error: str
    seconds: float  # of the processor
    wall: float  # seconds by the clock
    host: int  # bytes, the most that were resident

    @property
    def mistake(self) -> str:
        """The exit code and the last line of its errors; "" if it ended well."""
        if not self.code:
            return ""
        lines = self.error.strip().splitlines() or ["no message"]
        return f"exit code {self.code}: {lines[-1][:300]}"


def run(
    command: list[str], limit: float = float("inf"), environment: Mapping[str, str] = os.environ
) -> Ended:
    """Run a command until it ends, or is ended after `limit` seconds; it finds the project's modules."""
    paths = (environment.get("PYTHONPATH"), str(ROOT))
    env = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        folder, began = tempfile.gettempdir(), time.monotonic()
        process = subprocess.Popen(command, env=env, stdout=out, stderr=error, cwd=folder)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        while not ended:
            if time.monotonic() - began > limit:
                process.kill()
            time.sleep(0.05)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall, seconds = time.monotonic() - began, usage.ru_utime + usage.ru_stime
        out.seek(0), error.seek(0)
        outputs = out.read(), error.read()
        return Ended(process.returncode, *outputs, seconds, wall, usage.ru_maxrss << 10)


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


WIDTH = 7.5  # inches
NARROW = 5.2  # where a page shows the picture 400 pixels wide, small text is 9 pixels high


def picture(
    height: float, columns: int = 1, *, rows: int = 1, width: float = WIDTH, **layout: Any
) -> tuple["Figure", Any]:
    """A figure and its axes, drawn to a file. Raises `UserError` without matplotlib."""
    pyplot = plots.matplotlib("a picture")
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", **layout)


def written(figure: "Figure", path: Path | str, finding: str, caption: str = "") -> None:
    """Write a figure, above it what it shows: the finding in bold, below it `what` was drawn."""
    size = min(12.0, 840 / max(1, len(finding)))  # a longer line is set smaller, so that it fits
    figure.suptitle(finding, x=0.01, ha="left", weight="bold", size=size)
    if caption:
        figure.axes[0].set_title(caption, size=9.5, weight="normal", color=plots.SOFT)
    figure.set_layout_engine("constrained", w_pad=0.12)  # inches: no text touches the edge
    figure.savefig(path, dpi=200)
    plots.matplotlib("a picture").close(figure)


def plain(value: float, _: object = None) -> str:
    """The label of a tick as a number without exponent: 0.1, 10, 1,000."""
    return f"{value:,.12g}"
