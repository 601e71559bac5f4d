"""Estimates of a program's memory: a function each, and one line in `ESTIMATES`.

Another one is compared without a change here by `estimators --estimate FILE.py`, a file with a
function `estimate(program: Program) -> int | None`.
"""

import math
import runpy
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

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


Result = TypeVar("Result")
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


def of_file(path: str, seconds: float) -> Estimate:
    """The function `estimate` of a file, which raises `UserError` where it gives no number of bytes.

    Args:
        seconds: after which the file, and each call, is ended.

    Raises:
        UserError: the file does not run, or has no such function.
    """

    def run(function: Callable[..., Result], argument: object, when: str) -> Result:
        try:
            signal.signal(signal.SIGALRM, partial(_end, f"not done after {seconds:g} s"))
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return function(argument)
        except (Exception, SystemExit) as error:  # whatever a stranger's file raises
            why = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"--estimate is {path!r}, which does not run{when}: {why}") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    function = run(runpy.run_path, path, "").get("estimate")
    if not callable(function):
        raise UserError(f"--estimate is {path!r}, which has no function estimate(program): add it")

    def estimate(program: Program) -> int | None:
        size = run(function, program, f" with {program.script.stem}")
        if size is None:
            return None
        if type(size) not in (int, float) or not 1 <= size < math.inf:
            raise UserError(
                f"--estimate is {path!r}, which gives {size!r} for {program.script.stem}: "
                "return a number of bytes, or None"
            )
        return int(size)

    return estimate


def _end(why: str, *_: object) -> NoReturn:
    raise TimeoutError(why)
