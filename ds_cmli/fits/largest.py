"""The largest number in a program's arguments, at `{}`, with which it fits."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ds_cmli.allocator.allocator import by_retries
from ds_cmli.common.cli import DOES_NOT_FIT
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject

PLACE = "{}"
MOST = 1 << 20
COMMAND = "import sys; sys.argv[0] = 'fits'; from ds_cmli.fits.command import main; main()"


class Tried(NamedTuple):
    """What one number takes."""

    fits: bool
    device: int  # bytes
    retries: int = 0  # of the allocator, which then returned its cache for lack of room
    waited_for: Sequence[str] = ()  # optimizers that have done no step


def check(program: Sequence[str], named: bool) -> None:
    """Raise `UserError` unless one argument has the place, and a device is `named`."""
    places = sum(argument.count(PLACE) for argument in program)
    if places != 1:
        raise UserError(f"--fit needs one {PLACE} in the program's arguments, and finds {places}")
    if not named:
        raise UserError("--fit needs a device: give --gpu or --limit")


def largest(attempt: Callable[[int], Tried]) -> tuple[int, dict[int, Tried]]:
    """Find the largest number that fits, 0 if 1 does not; more is taken to need more.

    Returns it, and what was tried.
    """
    tried: dict[int, Tried] = {}
    low, high = 0, 1
    while high <= MOST:
        tried[high] = attempt(high)
        if not tried[high].fits:
            break
        low, high = high, 2 * high
    while high - low > 1 and high <= MOST:
        middle = (low + high) // 2
        tried[middle] = attempt(middle)
        if tried[middle].fits:
            low = middle
        else:
            high = middle
    return low, tried


def in_process_of_its_own(options: Sequence[str], program: Sequence[str], number: int) -> Tried:
    """Run the program with `number` at the place. Raises `UserError` as `answered` does."""
    given = [argument.replace(PLACE, str(number)) for argument in program]
    answer = answered(options, given, str(number))
    (fits,), (retries,) = answer["fits"].values(), answer["retries"].values()
    return Tried(fits, answer["totals"]["device"], retries, answer["waited_for"])


def answered(options: Sequence[str], program: Sequence[str], what: str) -> JsonObject:
    """Run `fits` with the program, and return the figures that it writes.

    Raises:
        UserError: the program, run with `what`, ends with an error of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.json"
        command = [sys.executable, "-c", COMMAND, *options, "--json", str(path), "--", *program]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode not in (0, DOES_NOT_FIT) or not path.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"with {what} the program ends with code {done.returncode}: {last}")
        return json.loads(path.read_text())


def sentence(number: int, tried: dict[int, Tried], room: object, program: Sequence[str]) -> str:
    """The answer in one sentence."""
    argument = next(place for place, word in enumerate(program) if PLACE in word)
    name = program[argument].replace(PLACE, "").rstrip("=")
    if not name and argument and program[argument - 1].startswith("-"):
        name = program[argument - 1]
    name = name or "the argument"
    more = tried.get(number + 1)
    with_more = f"; {number + 1} would take {more.device / 1e9:.2f} GB" if more else ""
    if not number:
        return f"not even {name} 1 fits on {room}{with_more}"
    taken = f"{tried[number].device / 1e9:.2f} GB{by_retries(tried[number].retries)}"
    return f"{name} {number} is the largest that fits on {room}: it takes {taken}{with_more}"
