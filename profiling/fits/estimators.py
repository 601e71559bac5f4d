"""How far estimates are off for the programs of `programs/`: `python -m profiling.fits.estimators`

Beside what PyTorch's allocator reserves on the null GPU stand `ds-cmli-memory fits`, accelerate's
rule (`accelerate estimate-memory`, training with Adam), DeepSpeed's estimators of ZeRO-2 and 3, and
the rule of thumb of 16 bytes a parameter. P(OOM) is the share of programs that reserve more than
the estimate, so that a GPU of that size may be too small.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError
from ds_cmli.fits.report import MARGIN
from profiling.fits.run_programs import GPU, PROGRAMS, RANKS, fits, fitted
from profiling.memory.estimators import RULE, Row, accelerate_estimate, deepspeed_estimate, summary
from profiling.scripts import processor

FIT, ACCELERATE, ZERO = "`fits`", "accelerate", "DeepSpeed, ZeRO-{}"
WRAPPER = Path(__file__).with_name("parameters_of.py")
Totals = dict[str, dict[str, int]]  # by "fits" and "null", as they tell them


def parameters(name: str, limit: int) -> dict[str, int | str]:
    """What `parameters_of.py` writes of a program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parameters.json"
        ended = fits(name, ["--steps", "1"], limit, (str(WRAPPER), str(path)))
        if ended.code:
            raise UserError(f"{name}: {ended.mistake}")
        return json.loads(path.read_text())


def row(name: str, totals: Totals, model: dict, margin: float) -> Row:
    """Every estimate of one program, in bytes."""
    size, largest, ranks = model["parameters"], model["largest"], RANKS.get(name, 1)
    answered, reserved = totals["fits"]["reserved"], totals["null"]["reserved"]
    estimates = {FIT: answered, with_margin(margin): int(answered * (1 + margin))}
    estimates[ACCELERATE] = accelerate_estimate(size, model["precision"])
    for stage in (2, 3):
        estimate = deepspeed_estimate(stage, size, largest, ranks, offload=False)
        estimates[ZERO.format(stage)] = estimate
    estimates[RULE] = 16 * size
    fails = {estimator: estimate < reserved for estimator, estimate in estimates.items()}
    return Row(name, reserved, estimates, fails)


def with_margin(margin: float) -> str:
    return f"{FIT} and {margin:.0%}"


def measured(name: str, limit: int) -> Totals:
    answered, _ = fitted(name, 2, "fake", limit)
    peaks, ended = fitted(name, 2, "null", limit)
    if not answered or not peaks:
        raise UserError(f"{name} has no figures: {ended.mistake}")
    return {"fits": answered, "null": peaks}


def table(rows: list[Row]) -> Iterator[str]:
    yield "| estimate | programs | median error | largest error | P(OOM) |\n|---|---|---|---|---|"
    for name, values in summary(rows, tuple(rows[0].estimates)).items():
        errors = f"{values['median_relative_error']:.2%} | {values['maximum_relative_error']:.2%}"
        yield f"| {name} | {values['settings']} | {errors} | {values['p_oom']:.0%} |"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--totals", type=click.Path(exists=True), help="What run_programs has kept.")
@click.option("--seconds", default=600, show_default=True, help="After which a program is ended.")
def command(names: tuple[str, ...], totals: str | None, seconds: int) -> None:
    """Compare estimates for the programs of profiling/fits/programs, or those NAMES."""
    known = json.loads(Path(totals).read_text()) if totals else {}
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {GPU}, 2 steps\n")
    rows = []
    for name in names or known or sorted(path.stem for path in PROGRAMS.glob("*.py")):
        try:
            its = known.get(name) or measured(name, seconds)
            rows.append(row(name, its, parameters(name, seconds), MARGIN))
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        errors = ", ".join(
            f"{estimator} {error:+.1%}" for estimator, error in rows[-1].errors().items()
        )
        print(f"{name}: {rows[-1].measured:,} B reserved; {errors}", flush=True)
    print("", *table(rows), sep="\n")


if __name__ == "__main__":
    run_command(command)
