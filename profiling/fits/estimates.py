"""Estimates of a program's memory: a function each, and one line in `ESTIMATES`.

Another one is compared without a change here by `estimators --estimate FILE.py`, a file with a
function `estimate(program: Program) -> int | None`.
"""

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ds_cmli.common.errors import UserError, one_line
from ds_cmli.fits.report import MARGIN
from profiling.memory.estimators import RULE, accelerate_estimate, deepspeed_estimate


@dataclass(frozen=True)
class Program:
    """What an estimator knows of a program of `programs/`, which trains on an A100 80GB."""

    script: Path
    ranks: int
    parameters: int  # of the modules that it runs
    largest: int  # the most parameters of one layer
    precision: str  # "fp32", "bf16" or "fp16": autocast's, or the parameters'
    fits: int  # bytes reserved by `ds-cmli-memory fits`, two steps


Estimate = Callable[[Program], int | None]  # bytes that PyTorch reserves; None: it has none


def fits(program: Program) -> int:
    return program.fits


def fits_and_margin(program: Program) -> int:
    return int(program.fits * (1 + MARGIN))


def accelerate(program: Program) -> int:
    return accelerate_estimate(program.parameters, program.precision)


def zero_2(program: Program) -> int:
    return deepspeed_estimate(2, program.parameters, program.largest, program.ranks)


def zero_3(program: Program) -> int:
    return deepspeed_estimate(3, program.parameters, program.largest, program.ranks)


def rule_of_thumb(program: Program) -> int:
    return 16 * program.parameters


ESTIMATES: dict[str, Estimate] = {
    "`fits`": fits,
    f"`fits` and {MARGIN:.0%}": fits_and_margin,
    "accelerate": accelerate,
    "DeepSpeed, ZeRO-2": zero_2,
    "DeepSpeed, ZeRO-3": zero_3,
    RULE: rule_of_thumb,
}


def of_file(path: str) -> Estimate:
    """The function `estimate` of a file. Raises `UserError`."""
    try:
        function = runpy.run_path(path).get("estimate")
    except Exception as error:  # whatever the file raises
        why = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"--estimate is {path!r}, which does not run: {why}") from None
    if not callable(function):
        raise UserError(f"--estimate is {path!r}, which has no function estimate(program): add it")
    return function
