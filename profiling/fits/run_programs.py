"""Runs the programs of `programs/` through `ds-cmli-memory fits`, and prints a table.

Each is a few lines that start a public package as its users do, with random weights. With `--null`, each program that fits
runs also on the null GPU of `tests/null_gpu`, and the table has the differences of `fits` from what PyTorch counted there in
place of bytes allocated and reserved; a line below it sums them up, and `--totals` keeps them.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click

from ds_cmli.common.cli import run_command
from profiling.scripts import Ended, processor, run

PROGRAMS = Path(__file__).parent / "programs"
KINDS = ("requested", "allocated", "reserved")
GPU = "A100 80GB"
RANKS = dict.fromkeys(
    ("ddp_gpt2", "fsdp2_llama", "deepspeed_zero2", "deepspeed_zero3", "trainer_deepspeed"), 2
)
FITS = "import sys; sys.argv[0] = 'fits'; from ds_cmli.fits.command import main; main()"


def fits(name: str, options: list[str], limit: int, program: tuple[str, ...] = ()) -> Ended:
    """Run `fits` on a program of `programs/`, as the rank that it has, behind what starts it."""
    ranks = ["--world-size", str(RANKS[name])] if name in RANKS else []
    script = [*program, str(PROGRAMS / f"{name}.py")]
    command = [sys.executable, "-c", FITS, "--gpu", GPU, *options, *ranks, "--", *script]
    return run(command, limit)


def fitted(name: str, steps: int, engine: str, limit: int) -> tuple[dict[str, int], Ended]:
    """What `fits` tells of a program: its totals, empty if there are none.

    Args:
        engine: "fake", or "null", by which PyTorch's allocator counts on the null GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.json"
        options = ["--steps", str(steps), "--engine", engine, "--json", str(path)]
        ended = fits(name, options, limit)
        return {} if ended.code else json.loads(path.read_text())["totals"], ended


@dataclass
class Row:
    """A program under `fits`, and what PyTorch counted of it, which is empty if it did not run."""

    name: str
    told: dict[str, int]
    run: Ended  # under `fits`
    found: dict[str, int]
    mistake: str  # of the program that did not run

    def off(self, kind: str) -> float:
        return self.told[kind] / self.found[kind] - 1

    def difference(self, kind: str) -> str:
        return "equal" if self.told[kind] == self.found[kind] else f"{self.off(kind):+.2%}"

    def line(self, null: bool) -> str:
        if not self.told:
            return f"| {self.name} | {self.mistake} |"
        cells = [self.name, *(f"{self.told[kind]:,}" for kind in KINDS)]
        if self.found:
            cells[2:] = [self.difference(kind) for kind in KINDS]
        elif null:
            cells[2:] = [self.mistake, "", ""]
        cells += [f"{self.run.seconds:.0f}", f"{self.run.wall:.0f}", f"{self.run.host / 1e9:.2f}"]
        return f"| {' | '.join(cells)} |"


def row(name: str, steps: int, null: bool, limit: int) -> Row:
    answered, ended = fitted(name, steps, "fake", limit)
    peaks, last = fitted(name, steps, "null", limit) if null and answered else ({}, ended)
    return Row(name, answered, ended, peaks, last.mistake)


def summary(rows: list[Row]) -> str:
    """How far `fits` is off, of the rows that have been compared."""
    requested = sorted(rows, key=lambda row: abs(row.off("requested")))
    reserved = sorted(rows, key=lambda row: row.off("reserved"))
    middle = median(abs(row.off("requested")) for row in rows)
    most = max(rows, key=lambda row: row.run.seconds)
    ends = [f"{row.off('reserved'):+.2%} ({row.name})" for row in (reserved[0], reserved[-1])]
    return (
        f"{len(rows)} programs; requested: {middle:.2%} off in the median, at most "
        f"{abs(requested[-1].off('requested')):.2%} ({requested[-1].name}); reserved: from "
        f"{' to '.join(ends)}; at most {most.run.seconds:.0f} CPU s ({most.name}) and "
        f"{max(row.run.host for row in rows) / 1e9:.2f} GB of host memory"
    )


@click.command()
@click.argument("names", nargs=-1)
@click.option("--null", is_flag=True, help="Run each on the null GPU as well.")
@click.option("--steps", default=2, show_default=True)
@click.option("--seconds", default=600, show_default=True, help="After which a program is ended.")
@click.option(
    "--totals", type=click.Path(dir_okay=False), help="A file for profiling.fits.estimators."
)
def command(
    names: tuple[str, ...], null: bool, steps: int, seconds: int, totals: str | None
) -> None:
    """Run the programs of profiling/fits/programs, or those NAMES."""
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {GPU}, {steps} steps\n")
    difference = "difference | " * null
    print(f"| program | requested | {difference}allocated | reserved | CPU s | s | host GB |")
    print("|---|---|---|---|---|---|---|" + "---|" * null)
    compared = []
    for name in names or sorted(path.stem for path in PROGRAMS.glob("*.py")):
        done = row(name, steps, null, seconds)
        print(done.line(null), flush=True)
        if done.found:
            compared.append(done)
    if compared:
        print(f"\n{summary(compared)}")
    if totals:
        by_name = {row.name: {"fits": row.told, "null": row.found} for row in compared}
        Path(totals).write_text(json.dumps(by_name))


if __name__ == "__main__":
    run_command(command)
