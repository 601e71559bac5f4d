"""How far estimates are off for the programs of `programs/`: `python -m profiling.fits.estimators`

The estimates of `estimates.py`, and those of `--estimate FILE.py`, against what PyTorch's allocator
reserves on the null GPU. P(OOM) is the share of programs that reserve more than the estimate, so
that a GPU of that size may be too small.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError
from profiling.fits.estimates import ESTIMATES, Estimate, Program, of_file
from profiling.fits.run_programs import GPU, PROGRAMS, RANKS, fits, fitted
from profiling.memory.estimators import Row, summary
from profiling.scripts import processor

WRAPPER = Path(__file__).with_name("parameters_of.py")
Totals = dict[str, dict[str, int]]  # by "fits" and "null", as they tell them


def parameters(name: str, limit: int) -> dict[str, Any]:
    """What `parameters_of.py` writes of a program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parameters.json"
        ended = fits(name, ["--steps", "1"], limit, (str(WRAPPER), str(path)))
        if ended.code:
            raise UserError(f"{name}: {ended.mistake}")
        return json.loads(path.read_text())


def program(name: str, totals: Totals, limit: int) -> Program:
    script = PROGRAMS / f"{name}.py"
    known = parameters(name, limit)
    return Program(script, RANKS.get(name, 1), **known, fits=totals["fits"]["reserved"])


def row(name: str, its: Program, reserved: int, estimates: Mapping[str, Estimate]) -> Row:
    """Every estimate of one program, in bytes."""
    out = Row(name, reserved)
    for estimator, estimate in estimates.items():
        size = None
        try:
            size = estimate(its)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
        if size is not None:
            out.estimates[estimator], out.fails[estimator] = size, size < reserved
    return out


def measured(name: str, limit: int) -> Totals:
    answered, _ = fitted(name, 2, "fake", limit)
    peaks, ended = fitted(name, 2, "null", limit)
    if not answered or not peaks:
        raise UserError(f"{name} has no figures: {ended.mistake}")
    return {"fits": answered, "null": peaks}


def table(rows: list[Row], names: tuple[str, ...]) -> Iterator[str]:
    yield "| estimate | programs | median error | largest error | P(OOM) |\n|---|---|---|---|---|"
    for name, values in summary(rows, names).items():
        errors = f"{values['median_relative_error']:.2%} | {values['maximum_relative_error']:.2%}"
        yield f"| {name} | {values['settings']} | {errors} | {values['p_oom']:.0%} |"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--totals", type=click.Path(exists=True), help="What run_programs has kept.")
@click.option("--seconds", default=600, show_default=True, help="After which a program is ended.")
@click.option("--estimate", "files", multiple=True, help="Another one: FILE.py. Repeatable.")
def command(
    names: tuple[str, ...], totals: str | None, seconds: int, files: tuple[str, ...]
) -> None:
    """Compare estimates for the programs of profiling/fits/programs, or those NAMES."""
    estimates = dict(ESTIMATES)
    for file in files:
        own = Path(file).stem
        if own in estimates:
            raise UserError(f"--estimate is {file!r}, and the table has {own} already: rename it")
        estimates[own] = of_file(file, seconds)
    known = json.loads(Path(totals).read_text()) if totals else {}
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {GPU}, 2 steps\n")
    rows = []
    for name in names or known or sorted(path.stem for path in PROGRAMS.glob("*.py")):
        try:
            its = known.get(name) or measured(name, seconds)
            its_program = program(name, its, seconds)
            rows.append(row(name, its_program, its["null"]["reserved"], estimates))
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        errors = ", ".join(
            f"{estimator} {error:+.1%}" for estimator, error in rows[-1].errors().items()
        )
        print(f"{name}: {rows[-1].measured:,} B reserved; {errors}", flush=True)
    print("", *table(rows, tuple(estimates)), sep="\n")


if __name__ == "__main__":
    run_command(command)
